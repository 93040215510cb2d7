"""The decoder's benchmark on a small export: every contender runs, figures are ratios within a round."""

import pytest

from megacm3.inference.benchmark import BATCH, GenerateTiming, benchmark_generate


def test_contenders_run(tmp_path):
    told = []
    timing = benchmark_generate(tmp_path, 4, 2, told.append, layers=1, hidden=64, peers=False)
    assert list(timing.rounds) == [
        "ceiling",
        "megacm3",
        "megacm3, guided",
        "megacm3, int8",
        f"megacm3, {BATCH} at once",
    ]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in timing.rounds.values())
    # A block of 12 hidden^2 weights and the codebook's rows of the head, fp32.
    assert timing.megabytes == (12 * 64**2 + 8192 * 64) * 4 / 1e6
    assert len(told) == 2 and "round 1 of 2" in told[0]


def test_ratios_are_medians_of_rounds():
    timing = GenerateTiming(1.0, 64, {}, {"a": [1.0, 9.0, 4.0], "b": [2.0, 3.0, 4.0]})
    assert timing.ratio("a", "b") == 1.0 and timing.rate("b") == pytest.approx(64 / 3)
