"""The chunked loss against a plain fp64 reference."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from megacm3.model import loss as loss_module
from megacm3.model.loss import IGNORE, chunked_loss

TOKENS, HIDDEN, ROWS, VOCAB = 37, 24, 64, 57
"""The table has 7 padding rows."""


def example(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    targets[::5] = IGNORE
    return hidden, weight, targets


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, z_loss: float, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(total, nll of the real targets, logZ of the real targets) in fp64, with all logits at once."""
    logits = hidden.double() @ weight[:VOCAB].double().T
    real = targets != IGNORE
    nll = F.cross_entropy(logits[real], targets[real], reduction="none")
    log_z = logits[real].logsumexp(dim=1)
    return (nll.sum() + z_loss * log_z.square().sum()) * scale, nll, log_z


@pytest.mark.parametrize("chunk", [1, 7, 36, 37, 1024])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_equals_the_plain_loss_for_any_chunk(monkeypatch: pytest.MonkeyPatch, chunk: int, z_loss: float) -> None:
    monkeypatch.setattr(loss_module, "CPU_CHUNK", chunk)
    hidden, weight, targets = example(torch.float64)
    total, nll, log_z = chunked_loss(hidden, weight, targets, vocab_size=VOCAB, z_loss=z_loss, scale=0.25)
    expected, nll_expected, log_z_expected = plain(hidden, weight, targets, z_loss, 0.25)
    real = targets != IGNORE
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(nll[real], nll_expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(log_z[real], log_z_expected.detach(), rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(total * 3.0, (hidden, weight))
    for mine, reference in zip(gradients, torch.autograd.grad(expected * 3.0, (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_low_precision_stays_near_fp64(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, targets = example(dtype)
    total, nll, _ = chunked_loss(hidden, weight, targets, vocab_size=VOCAB, z_loss=0.01)
    expected, _, _ = plain(hidden, weight, targets, 0.01, 1.0)
    assert nll.dtype == torch.float32, "the loss itself is never in half precision"
    assert total.item() == pytest.approx(expected.item(), rel=tolerance)
    for mine, reference in zip(
        torch.autograd.grad(total, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        assert mine.dtype == dtype
        error = (mine.double() - reference.double()).norm() / reference.double().norm()
        assert float(error) < tolerance


def test_padding_rows_and_ignored_targets_get_nothing() -> None:
    hidden, weight, targets = example(torch.float32)
    total, _, _ = chunked_loss(hidden, weight, targets, vocab_size=VOCAB, z_loss=0.1)
    grad_hidden, grad_weight = torch.autograd.grad(total, (hidden, weight))
    assert not grad_weight[VOCAB:].any() and grad_weight[:VOCAB].any(dim=1).all()
    assert not grad_hidden[targets == IGNORE].any()


def test_padding_rows_change_nothing() -> None:
    hidden, weight, targets = example(torch.float64)
    padded, _, _ = chunked_loss(hidden, weight, targets, vocab_size=VOCAB, z_loss=0.1)
    bare, _, _ = chunked_loss(hidden, weight[:VOCAB], targets, vocab_size=VOCAB, z_loss=0.1)
    assert padded.item() == bare.item()


def test_z_loss_takes_the_shifted_targets() -> None:
    """The fault of Lumina-mGPT #13: a z-loss over other places than those with a target."""
    hidden, weight, targets = example(torch.float64)
    with_z, _, log_z = chunked_loss(hidden, weight, targets, vocab_size=VOCAB, z_loss=1.0)
    without, _, _ = chunked_loss(hidden, weight, targets, vocab_size=VOCAB)
    assert (with_z - without).item() == pytest.approx(float(log_z[targets != IGNORE].square().sum()), rel=1e-12)


def test_no_target_at_all() -> None:
    hidden, weight, targets = example(torch.float32)
    total, _, _ = chunked_loss(hidden, weight, torch.full_like(targets, IGNORE), vocab_size=VOCAB, z_loss=1.0)
    gradients = torch.autograd.grad(total, (hidden, weight))
    assert total.item() == 0.0 and not any(g.any() for g in gradients)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = example(torch.float32)
    total, _, _ = chunked_loss(hidden * 1e3, weight, targets, vocab_size=VOCAB)
    assert bool(torch.isfinite(total))


def test_without_gradient_no_gradient_is_computed() -> None:
    hidden, weight, targets = example(torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as evaluating:
        total, _, _ = chunked_loss(hidden, weight, targets, vocab_size=VOCAB)
    assert not total.requires_grad
    assert evaluating.get_total_flops() == 2 * TOKENS * HIDDEN * ROWS


def test_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor made on the way has more numbers than a chunk of logits or the table's gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    monkeypatch.setattr(loss_module, "CPU_CHUNK", 16)
    hidden = torch.randn(4096, 8, requires_grad=True)
    weight = torch.randn(512, 8, requires_grad=True)
    with Largest() as largest:
        chunked_loss(hidden, weight, torch.randint(0, 512, (4096,)), vocab_size=512)[0].backward()
    assert largest.numel == hidden.numel(), "16 x 512 logits and 512 x 8 gradients are smaller than the hidden states"
