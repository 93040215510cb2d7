"""Norms, rotary positions, dropout and feed-forward against naive versions written out here."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megacm3.config import Config, ModelConfig
from megacm3.model.layers import HeadNorm, KeyedDropout, Norm, Rotary
from megacm3.parallel.context import ParallelContext


def of_rank(context: ParallelContext, rank: int, world: int, sequence: bool = False) -> ParallelContext:
    """The context of one tensor rank of several, for what needs no communication."""
    return replace(context, rank=rank, world=world, tensor=world, sequence=sequence)


def filled(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return module


def test_parameter_free_layernorm(context: ParallelContext, configure: Callable[..., Config]) -> None:
    norm = Norm("final_norm", configure("tiny_cm3leon").model, context, torch.float32)
    x = torch.randn(5, 2, 64) * 3 + 1
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert not list(norm.parameters())
    torch.testing.assert_close(norm(x), expected)


def test_rmsnorm(context: ParallelContext, configure: Callable[..., Config]) -> None:
    norm = filled(Norm("final_norm", configure("tiny_chameleon_7b").model, context, torch.float32))
    x = torch.randn(5, 2, 64) * 3 + 1
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("heads, groups", [(8, 1), (8, 2), (8, 4), (8, 8), (4, 8)])
def test_head_norm_is_a_norm_of_its_own_for_each_head(
    context: ParallelContext, configure: Callable[..., Config], kind: str, heads: int, groups: int
) -> None:
    model = configure("tiny_chameleon_34b", f"model.qk_norm={kind}", f"model.qk_norm_groups={groups}").model
    norm = filled(HeadNorm("layers.0.attn.q_norm", heads, model, context, torch.float32))
    rows = min(groups, heads)
    x = torch.randn(3, 2, heads, 8) * 2 + 1
    out = norm(x)
    assert norm.weight.shape == (rows, 8) and hasattr(norm, "bias") == (kind == "layernorm")
    for head in range(heads):
        row = head // (heads // rows)
        y = x[:, :, head]
        if kind == "layernorm":
            expected = F.layer_norm(y, (8,), norm.weight[row], norm.bias[row], 1e-5)
        else:
            expected = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight[row]
        torch.testing.assert_close(out[:, :, head], expected)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_head_norm_of_a_tensor_rank_takes_its_own_heads_rows(
    monkeypatch: pytest.MonkeyPatch,
    context: ParallelContext,
    configure: Callable[..., Config],
    world: int,
    groups: int,
) -> None:
    from megacm3.model import layers

    # The forward of the reduction is the identity; what its backward sums is tests/dist/test_equality.py's.
    monkeypatch.setattr(layers, "summed_over_tensor_ranks", lambda parameter, _: parameter)
    model = configure("tiny_chameleon_34b", f"model.qk_norm_groups={groups}", "model.kv_heads=8").model
    whole = filled(HeadNorm("layers.0.attn.q_norm", 8, model, context, torch.float32))
    x = torch.randn(3, 2, 8, 8)
    expected = whole(x).chunk(world, dim=2)
    for rank in range(world):
        mine = filled(HeadNorm("layers.0.attn.q_norm", 8, model, of_rank(context, rank, world), torch.float32))
        torch.testing.assert_close(mine(x.chunk(world, dim=2)[rank]), expected[rank])


def test_rotary_turns_pairs_half_a_head_apart() -> None:
    size, length = 8, 6
    model = ModelConfig(hidden_size=2 * size, heads=2, sequence_length=length, positions="rope", rope_theta=100.0)
    rotary = Rotary(model, torch.device("cpu"))
    x = torch.randn(length, 1, 2, size)
    out = rotary(x, None)
    for place in range(length):
        for i in range(size // 2):
            angle = place * 100.0 ** (-2 * i / size)
            a, b = x[place, 0, :, i], x[place, 0, :, i + size // 2]
            torch.testing.assert_close(out[place, 0, :, i], a * math.cos(angle) - b * math.sin(angle))
            torch.testing.assert_close(out[place, 0, :, i + size // 2], b * math.cos(angle) + a * math.sin(angle))


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    model = ModelConfig(hidden_size=16, heads=1, sequence_length=4096, positions="rope")
    rotary = Rotary(model, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, 16)

    def score(i: int, j: int) -> float:
        at = [torch.tensor([[place]]) for place in (i, j)]
        return float((rotary(q, at[0]) * rotary(k, at[1])).sum())

    assert score(4095, 4090) == pytest.approx(score(5, 0), abs=2e-4)
    assert score(4095, 4090) != pytest.approx(score(6, 0), abs=1e-2)


def test_rotary_matches_transformers() -> None:
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    model = ModelConfig(hidden_size=64, heads=4, sequence_length=32, positions="rope", rope_theta=10000.0)
    rotary = Rotary(model, torch.device("cpu"))
    q = torch.randn(2, 4, 32, 16)
    theirs = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=32))
    cos, sin = theirs(q, torch.arange(32)[None].expand(2, -1))
    expected, _ = apply_rotary_pos_emb(q, q, cos, sin)
    torch.testing.assert_close(rotary(q.permute(2, 0, 1, 3), None).permute(1, 2, 0, 3), expected, rtol=1e-5, atol=1e-5)


def dropout(context: ParallelContext, p: float = 0.1, place: str = "layers.0.attn", seed: int = 0) -> KeyedDropout:
    return KeyedDropout(p, place, seed, context)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_rate_and_scale(context: ParallelContext, p: float) -> None:
    layer, numbers = dropout(context, p), torch.arange(8)
    out = layer(torch.ones(128, 8, 512), numbers)
    dropped = float((out == 0).float().mean())
    # Half a million draws: the rate's standard deviation is below 0.0007.
    assert dropped == pytest.approx(p, abs=0.003)
    assert torch.equal(out[out != 0], torch.full_like(out[out != 0], 1.0 / (1.0 - p)))
    for dim in (0, 1, 2):  # no position, row or channel is special
        others = [d for d in range(3) if d != dim]
        rates = (out == 0).float().mean(dim=others)
        # Five standard deviations of a rate over the numbers that it is a mean of.
        assert float((rates - p).abs().max()) < 5 * math.sqrt(p * (1 - p) * len(rates) / out.numel())


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation of two masks; 0 for independent ones."""
    return float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())).float())[0, 1])


def test_dropout_masks_of_rows_places_and_steps_are_independent(context: ParallelContext) -> None:
    numbers = torch.tensor([0, 1, 2, 1 << 31, (1 << 31) + 1, (1 << 40) + 7])
    mask = dropout(context, 0.5).mask(numbers, 64, 256)
    rows = [mask[:, i] for i in range(len(numbers))]
    bound = 5 / math.sqrt(64 * 256)
    for i in range(len(rows)):
        assert abs(agreement(rows[i][:-1], rows[i][1:])) < bound, "positions"
        assert abs(agreement(rows[i][:, :-1], rows[i][:, 1:])) < bound, "channels"
        for j in range(i):
            assert abs(agreement(rows[i], rows[j])) < bound, (i, j)
    for other in (
        dropout(context, 0.5, "layers.1.attn"),
        dropout(context, 0.5, "layers.0.mlp"),
        dropout(context, 0.5, seed=1),
    ):
        assert abs(agreement(mask, other.mask(numbers, 64, 256))) < bound


def test_dropout_is_the_same_each_time_and_in_any_batch(context: ParallelContext) -> None:
    layer = dropout(context)
    together = layer.mask(torch.tensor([3, 9, 4]), 16, 32)
    assert torch.equal(together, layer.mask(torch.tensor([3, 9, 4]), 16, 32))
    assert torch.equal(together[:, 1:2], layer.mask(torch.tensor([9]), 16, 32))


@pytest.mark.parametrize("world", [2, 4])
def test_dropout_of_sequence_parallel_ranks_makes_the_whole(context: ParallelContext, world: int) -> None:
    numbers = torch.tensor([5, 6])
    whole = dropout(context).mask(numbers, 64, 32)
    slices = [dropout(of_rank(context, r, world, sequence=True)).mask(numbers, 64 // world, 32) for r in range(world)]
    assert torch.equal(torch.cat(slices), whole)
    # Without sequence parallel, tensor ranks hold the same activations and need the same masks.
    assert torch.equal(dropout(of_rank(context, 1, world)).mask(numbers, 64, 32), whole)


def test_dropout_needs_no_generator_and_keeps_the_dtype(context: ParallelContext) -> None:
    layer, state = dropout(context), torch.get_rng_state()
    out = layer(torch.ones(4, 2, 8, dtype=torch.bfloat16), torch.arange(2))
    assert out.dtype == torch.bfloat16
    assert torch.equal(torch.get_rng_state(), state)


def test_no_dropout_in_evaluation(context: ParallelContext) -> None:
    x = torch.ones(4, 2, 8)
    assert dropout(context).eval()(x, torch.arange(2)) is x
    assert dropout(context, 0.0)(x, torch.arange(2)) is x


@pytest.mark.parametrize("preset", ["tiny_cm3leon", "tiny_chameleon_7b"])
def test_feed_forward(network: Callable[..., Any], preset: str) -> None:
    block = network(preset, "model.init_residual=scaled")[0].stages[2]
    x = torch.randn(5, 2, 64)
    up, down = block.mlp.up.weight, block.mlp.down.weight
    if preset == "tiny_cm3leon":
        expected = F.relu(x @ up.T) @ down.T
    else:
        gate, value = up.chunk(2)
        expected = (F.silu(x @ gate.T) * (x @ value.T)) @ down.T
    torch.testing.assert_close(block.mlp(x), expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_attention_against_one_head_at_a_time(network: Callable[..., Any], kv_heads: int) -> None:
    groups = "model.qk_norm_groups=1"
    net, _, _ = network("tiny_chameleon_34b", f"model.kv_heads={kv_heads}", groups, "model.init_residual=scaled")
    block = net.stages[2]
    attention, size, heads = block.attn, 8, 8
    filled(attention.q_norm)
    filled(attention.k_norm)
    x = torch.randn(12, 2, 64)
    q, k, v = (x @ attention.qkv.weight.T).split([heads * size, kv_heads * size, kv_heads * size], dim=-1)
    out = []
    for head in range(heads):
        shared = head // (heads // kv_heads)
        q_h, k_h, v_h = q[..., head * size :][..., :size], *(t[..., shared * size :][..., :size] for t in (k, v))
        q_h = F.layer_norm(q_h, (size,), attention.q_norm.weight[0], attention.q_norm.bias[0], 1e-5)
        k_h = F.layer_norm(k_h, (size,), attention.k_norm.weight[0], attention.k_norm.bias[0], 1e-5)
        q_h, k_h = (block.rotary(t[:, :, None], None)[:, :, 0] for t in (q_h, k_h))
        scores = torch.einsum("tbd,sbd->bts", q_h, k_h) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
        out.append(torch.einsum("bts,sbd->tbd", scores.softmax(-1), v_h))
    expected = torch.cat(out, dim=-1) @ attention.o.weight.T
    torch.testing.assert_close(attention(x, block.rotary, None, None), expected, rtol=1e-4, atol=1e-5)
