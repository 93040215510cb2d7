"""Initial weights depend on the seed and the name alone."""

import math

import pytest
import torch

from megacm3.config import ModelConfig
from megacm3.model.init import draw
from megacm3.parallel import parts
from megacm3.parallel.parts import Part

CM3LEON = ModelConfig(layers=4, hidden_size=64, vocab_size=512)
# 40,000 rows of 64: several of the blocks in which a tensor is drawn.
TALL = (40_000, 64)


@pytest.mark.parametrize("low, high", [(0, 1), (16_383, 16_385), (5, 40_000), (39_999, 40_000), (20_000, 20_000)])
@pytest.mark.parametrize("init", ["truncated", "normal"])
def test_any_rows_equal_the_slice_of_the_whole(low: int, high: int, init: str) -> None:
    model = ModelConfig(init=init, hidden_size=64)
    everything = draw(parts.whole("embed.weight", TALL), model, seed=3)
    box = draw(Part("embed.weight", TALL, (low, 0), (high - low, 64), 0), model, seed=3)
    assert torch.equal(box, everything[low:high])


@pytest.mark.parametrize("world", [2, 4, 8])
def test_columns_of_all_ranks_make_the_whole(world: int) -> None:
    model = ModelConfig(init_residual="scaled", hidden_size=64)
    everything = draw(parts.whole("layers.1.attn.o.weight", (64, 64)), model, seed=0)
    boxes = [
        draw(parts.columns("layers.1.attn.o.weight", (64, 64), rank, world), model, seed=0) for rank in range(world)
    ]
    assert torch.equal(torch.cat(boxes, dim=1), everything)


def test_seed_and_name_decide() -> None:
    def drawn(name: str, seed: int) -> torch.Tensor:
        return draw(parts.whole(name, (64, 64)), CM3LEON, seed)

    first = drawn("layers.0.attn.q.weight", 0)
    assert torch.equal(first, drawn("layers.0.attn.q.weight", 0))
    others = [
        drawn("layers.0.attn.q.weight", 1),
        drawn("layers.0.attn.k.weight", 0),
        drawn("layers.1.attn.q.weight", 0),
    ]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack((first.flatten(), other.flatten())))[0, 1])) < 0.06


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(parts.whole("embed.weight", (64, 64)), CM3LEON, 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(draw(parts.whole("embed.weight", (64, 64)), CM3LEON, 0), first)


def test_cm3leon_rules() -> None:
    """CM3Leon 2.3: std 0.006 cut at 3 std, positions 0.0002, the two matrices into the residual stream zero."""

    def drawn(name: str) -> torch.Tensor:
        return draw(parts.whole(name, (512, 256)), CM3LEON, 0)

    words = drawn("embed.weight")
    # A normal distribution cut at 3 standard deviations has 0.9866 of the standard deviation.
    assert float(words.std()) == pytest.approx(0.006 * 0.9866, rel=0.01)
    assert float(words.abs().max()) <= 0.018 and abs(float(words.mean())) < 1e-4
    assert float(drawn("positions.weight").std()) == pytest.approx(0.0002 * 0.9866, rel=0.01)
    assert not drawn("layers.0.attn.o.weight").any() and not drawn("layers.3.mlp.down.weight").any()
    assert float(drawn("layers.0.mlp.up.weight").std()) == pytest.approx(0.006 * 0.9866, rel=0.01)


def test_llama_rules() -> None:
    """Normal 0.02, the matrices into the residual stream 0.02 / sqrt(2 layers); norms one, their biases zero."""
    model = ModelConfig(layers=8, init="normal", init_std=0.02, init_residual="scaled")
    down = draw(parts.whole("layers.0.mlp.down.weight", (512, 256)), model, 0)
    assert float(down.std()) == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    assert float(draw(parts.whole("head.weight", (512, 256)), model, 0).std()) == pytest.approx(0.02, rel=0.02)
    assert torch.equal(draw(parts.whole("layers.0.attn.q_norm.weight", (4, 16)), model, 0), torch.ones(4, 16))
    assert torch.equal(draw(parts.whole("layers.0.attn.k_norm.bias", (1, 16)), model, 0), torch.zeros(1, 16))
    assert torch.equal(draw(parts.whole("final_norm.weight", (64,)), model, 0), torch.ones(64))
