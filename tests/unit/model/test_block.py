"""Blocks: norm orders, the document mask, positions that start again, recomputation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megacm3.model.block import document_mask, pack, positions_in_document, unpack
from megacm3.model.loss import IGNORE

LENGTHS = (20, 1, 30, 13)
"""Documents of one sequence of 64; one of a single token."""


def packed(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens [1, 64], targets [1, 64] that stay inside their document, documents [1, 64])."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab_size, (1, 64), generator=generator)
    targets = torch.randint(0, vocab_size, (1, 64), generator=generator)
    documents = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
    return tokens, targets, documents


def loss_and_gradients(net: Any, tokens: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor) -> Any:
    net.zero_grad()
    loss = net(tokens, pack(torch.tensor([7]), documents, targets))
    loss.backward()
    return loss.detach().double(), {name: p.grad.clone() for name, p in net.named_parameters()}


def test_pack_and_unpack() -> None:
    numbers, documents = torch.tensor([3, 1 << 40]), torch.randint(0, 9, (2, 6), dtype=torch.int32)
    targets = torch.randint(-100, 9, (2, 6))
    back = unpack(pack(numbers, documents, targets))
    for mine, expected in zip(back, (numbers, documents.long(), targets), strict=True):
        assert torch.equal(mine, expected)


def test_positions_in_document() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 2, 2, 9, 9], [4, 4, 4, 4, 4, 4, 4, 4], [0, 1, 0, 1, 1, 2, 2, 2]])
    expected = torch.tensor([[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 1, 0, 1, 2]])
    assert torch.equal(positions_in_document(documents), expected)


def test_document_mask() -> None:
    mask = document_mask(torch.tensor([[0, 0, 1, 1, 1]]))
    assert mask.shape == (1, 1, 5, 5)
    expected = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).tril().bool()
    assert torch.equal(mask[0, 0], expected)


@pytest.mark.parametrize("preset", ["tiny_cm3leon", "tiny_chameleon_7b", "tiny_chameleon_34b", "tiny_modern"])
def test_masked_documents_equal_documents_one_by_one(network: Callable[..., Any], preset: str) -> None:
    """Mask and position reset: a packed sequence gives the sum of its documents' losses and gradients."""
    options = ("data.document_mask=true", "data.position_reset=true", "model.init_residual=scaled")
    net, _, config = network(preset, *options)
    tokens, targets, documents = packed(config.model.vocab_size)
    total, gradients = loss_and_gradients(net, tokens, targets, documents)
    alone_total = torch.zeros((), dtype=torch.float64)
    alone = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for low, length in zip((0, 20, 21, 51), LENGTHS, strict=True):
        part = slice(low, low + length)
        loss, grads = loss_and_gradients(
            net, tokens[:, part], targets[:, part], torch.zeros(1, length, dtype=torch.int64)
        )
        alone_total += loss
        for name, grad in grads.items():
            alone[name] += grad
    assert float(total) == pytest.approx(float(alone_total), rel=1e-6)
    for name, grad in gradients.items():
        error = (grad - alone[name]).norm() / alone[name].norm().clamp(min=1e-12)
        assert float(error) < 2e-5, f"{name}: {float(error)}"


def test_without_the_mask_documents_see_one_another(network: Callable[..., Any]) -> None:
    net, _, config = network("tiny_chameleon_7b")
    tokens, targets, documents = packed(config.model.vocab_size)
    targets[:, :40] = IGNORE
    loss, _ = loss_and_gradients(net, tokens, targets, documents)
    tokens[:, 3] = (tokens[:, 3] + 1) % config.model.vocab_size
    changed, _ = loss_and_gradients(net, tokens, targets, documents)
    assert float(loss) != float(changed)


def test_position_reset_needs_no_mask_to_be_seen(network: Callable[..., Any]) -> None:
    """With the mask alone, learned positions still count from the sequence's start."""
    masked, _, config = network("tiny_cm3leon", "data.document_mask=true", "model.init_positions_std=0.1")
    reset, _, _ = network(
        "tiny_cm3leon", "data.document_mask=true", "data.position_reset=true", "model.init_positions_std=0.1"
    )
    arguments = packed(config.model.vocab_size)
    assert float(loss_and_gradients(masked, *arguments)[0]) != float(loss_and_gradients(reset, *arguments)[0])


@pytest.mark.parametrize("order", ["pre", "swin"])
def test_norm_order(network: Callable[..., Any], order: str) -> None:
    """pre: x + f(norm(x)); swin: x + norm(f(x)) (Chameleon 2.3)."""
    net, _, _ = network("tiny_chameleon_7b", f"model.norm_order={order}")
    block = net.stages[2]
    x = torch.randn(64, 1, 64)
    meta = pack(torch.tensor([0]), torch.zeros(1, 64, dtype=torch.int64), torch.zeros(1, 64, dtype=torch.int64))

    def attend(h: torch.Tensor) -> torch.Tensor:
        return block.attn(h, block.rotary, None, None)

    if order == "swin":
        h = x + block.attn_norm(attend(x))
        expected = h + block.mlp_norm(block.mlp(h))
    else:
        h = x + attend(block.attn_norm(x))
        expected = h + block.mlp(block.mlp_norm(h))
    torch.testing.assert_close(block((x, meta))[0], expected)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("preset", ["tiny_cm3leon", "tiny_chameleon_34b"])
def test_recomputation_changes_no_bit(network: Callable[..., Any], preset: str, recompute: str) -> None:
    options = ("model.dropout=0.1", "model.init_residual=scaled", "data.document_mask=true")
    plain, _, config = network(preset, *options)
    again, _, _ = network(preset, *options, f"parallel.recompute={recompute}")
    arguments = packed(config.model.vocab_size)
    loss, gradients = loss_and_gradients(plain, *arguments)
    loss_again, gradients_again = loss_and_gradients(again, *arguments)
    assert float(loss) == float(loss_again)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


@pytest.mark.parametrize("preset", ["tiny_cm3leon", "tiny_chameleon_7b", "tiny_chameleon_34b", "tiny_modern"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_bf16_runs_with_everything_on(network: Callable[..., Any], preset: str, recompute: str) -> None:
    options = ("model.dropout=0.1", "data.document_mask=true", "data.position_reset=true", "objective.z_loss=1e-4")
    net, _, config = network(preset, "train.dtype=bf16", f"parallel.recompute={recompute}", *options)
    exact, _, _ = network(preset, "train.dtype=fp32", *options)
    arguments = packed(config.model.vocab_size)
    loss, gradients = loss_and_gradients(net, *arguments)
    expected, _ = loss_and_gradients(exact, *arguments)
    assert all(grad.dtype == torch.bfloat16 for grad in gradients.values())
    assert float(loss) == pytest.approx(float(expected), rel=0.01)
