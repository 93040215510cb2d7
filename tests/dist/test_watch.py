"""What ranks say of themselves: who is slow, norm gains and losses by position alike in every layout."""

from typing import Any

import pytest

from tests.helpers.distributed import ROOT, run_distributed
from tests.helpers.layouts import batch, micro_batches, start

BASE = ["model.preset=tiny_modern", "train.global_batch=4", "train.micro_batch=1", "model.layers=2"]


def watched(keys: list[str], slow_rank: int = -1) -> dict[str, Any]:
    """One step; what all ranks together know after it."""
    import os

    from megacm3.faults import VARIABLE
    from megacm3.training.ranks import Ranks

    config, context, engine = start(keys)
    ranks = Ranks(engine)
    engine.train_step(micro_batches(batch(0, config), config, context))
    if slow_rank >= 0:
        os.environ[VARIABLE] = f"forward:rank={slow_rank}:sleep=0.2"
    result = engine.train_step(micro_batches(batch(1, config), config, context))
    figures = ranks.gather(0.0)
    return {
        "gains": figures.gains,
        "forward": figures.forward,
        "memory": figures.memory,
        "slow": ranks.slow(figures),
        "positions": result.positions.tolist(),
        "sums": result.sums.tolist(),
    }


def keys(zero: int = 1, **more: Any) -> list[str]:
    return [*BASE, f"deepspeed={ROOT}/ds_configs/zero{zero}.json", *(f"{k.replace('__', '.')}={v}" for k, v in more.items())]


def test_the_slow_rank_of_two_is_named_on_both() -> None:
    for answer in run_distributed(watched, 2, keys=keys(), slow_rank=1):
        assert answer["slow"].startswith("rank 1 on ") and "forward pass" in answer["slow"], answer["slow"]


def test_figures_are_alike_in_every_layout() -> None:
    (one,) = run_distributed(watched, 1, keys=keys(0))
    assert one["slow"] == "" and one["memory"] > 1 << 20
    assert set(one["gains"]) == {"q_gain", "q_gain_max", "k_gain", "k_gain_max"}
    assert sum(one["positions"][1]) == one["sums"][3] and sum(one["positions"][0]) == pytest.approx(one["sums"][0])
    assert min(one["positions"][1]) > 0
    layouts = [keys(3), keys(1, parallel__tensor=2, parallel__sequence="true"), keys(1, parallel__pipeline=2)]
    for layout in layouts:
        for answer in run_distributed(watched, 2, keys=layout):
            assert len(answer["forward"]) == 2 and min(answer["forward"]) > 0
            assert answer["gains"] == pytest.approx(one["gains"], rel=1e-5), layout
            assert answer["positions"][1] == one["positions"][1]
            assert answer["positions"][0] == pytest.approx(one["positions"][0], rel=1e-5)
