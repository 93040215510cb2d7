"""The training benchmark in small: three programs that do the same work."""

import pytest

from megacm3.errors import ConfigError
from megacm3.resolve import load_config
from megacm3.training.benchmark import SHAPE, Comparison, Result, benchmark_train, step_flops

SMALL = [
    "model.layers=2",
    "model.hidden_size=64",
    "model.heads=4",
    "model.kv_heads=2",
    "model.ffn_size=128",
    "model.vocab_size=512",
    "model.sequence_length=32",
]


def test_shape() -> None:
    """25.7M in the trunk; 6 FLOPs a weight and token, and attention's."""
    config = load_config(None, SHAPE)
    trunk, table = 8 * (4 * 512 * 512 + 3 * 512 * 1408), 512 * 65536
    assert trunk == 25_690_112
    assert step_flops(config) == 4 * 1024 * (6 * (trunk + table) + 3 * 8 * 4 * 512 * 1024)


def test_figures_are_medians_of_the_rounds() -> None:
    config = load_config(None, SHAPE)
    mine = Result("megacm3", 100, [], 1900, seconds=[1.0, 2.0, 9.0], matmul=[1e12, 2e12, 1e12])
    other = Result("transformers", 100, [], 2200, seconds=[2.0, 2.0, 9.0], matmul=[1e12] * 3)
    found = Comparison(config, {"megacm3": mine, "transformers": other})
    assert found.tokens_per_second("megacm3") == 4096 / 2.0
    assert found.ratio("megacm3", "transformers") == 1.0
    assert found.utilisation("megacm3") == step_flops(config) / 4e12
    assert (mine.above_states, other.above_states) == (300, 600)


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ConfigError, match="--rounds 0"):
        benchmark_train(0, [])


@pytest.mark.long
def test_three_programs_do_the_same_work() -> None:
    found = benchmark_train(2, SMALL, top=3)
    assert [len(result.seconds) for result in found.results.values()] == [2, 2, 2]
    assert len({result.parameters for result in found.results.values()}) == 1
    assert found.profile is not None and len(found.profile[1]) == 3
    assert all(result.peak_bytes > result.state_bytes for result in found.results.values())
