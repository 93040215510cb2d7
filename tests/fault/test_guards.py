"""A number that goes wrong on one rank: all agree, no parameter changes, the batch and the module are named."""

import json
import math
from pathlib import Path

import pytest
import torch

from megacm3.checkpoint.boxes import whole
from megacm3.checkpoint.reader import Checkpoint
from tests.helpers.distributed import ROOT, run_distributed
from tests.helpers.ranks import make_config
from tests.helpers.trainer import curve, trained

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_config(tmp_path_factory.mktemp("guards"))


def contents(out: Path, step: int) -> dict[tuple[str, str], torch.Tensor]:
    """Every tensor of every kind, whole."""
    checkpoint = Checkpoint(out / f"checkpoints/step_{step:06d}", verify="sha256")
    found = {}
    for kind, dtype in checkpoint.kinds.items():
        for name, shape in checkpoint.shapes.items():
            found[kind, name] = torch.full(shape, math.nan, dtype=dtype)
            checkpoint.read(kind, name, whole(shape), found[kind, name])
    return found


def unchanged(out: Path, before: int, after: int) -> bool:
    a, b = contents(out, before), contents(out, after)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def zero(stage: int) -> str:
    return f"deepspeed={ROOT}/ds_configs/zero{stage}.json"


LAYOUTS = {
    "zero0": (2, [zero(0)]),
    "zero0-bf16": (2, [zero(0), "train.dtype=bf16"]),
    "zero1": (2, []),
    "zero2-bf16": (2, [zero(2), "train.dtype=bf16"]),
    "zero3": (2, [zero(3)]),
    "tp2": (2, ["parallel.tensor=2"]),
    "tp2-bf16": (2, ["parallel.tensor=2", "train.dtype=bf16"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "pp2-bf16": (2, ["parallel.pipeline=2", "train.dtype=bf16"]),
    "tp2-pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
}


NAN, INF = "output:rank=1:step=3:nan", "gradient:rank=0:step=3:parameter=1:inf"
CASES = [(name, NAN) for name in LAYOUTS] + [(name, INF) for name in ("zero1", "zero3", "tp2", "pp2", "pp2-bf16")]


@pytest.mark.parametrize("layout, what", CASES, ids=[f"{name}-{what.split(':')[-1]}" for name, what in CASES])
def test_no_rank_updates_when_one_is_not_finite(config: Path, tmp_path: Path, layout: str, what: str) -> None:
    """The NaN is put on rank 1 (the last stage of a pipeline), the Inf on rank 0 (its first stage, one tensor rank)."""
    world, keys = LAYOUTS[layout]
    more = [*keys, "checkpoint.every=1", "train.steps=4"]
    said = run_distributed(trained, world, config=str(config), out=str(tmp_path), overrides=more, fault=what)
    assert [one["code"] for one in said] == [0] * world and {one["step"] for one in said} == {4}
    assert all(one["guards"]["refused"] == [3] for one in said)
    assert unchanged(tmp_path, 2, 3) and not unchanged(tmp_path, 3, 4)
    assert sorted(curve(tmp_path)) == [1, 2, 4]
    told = json.loads((tmp_path / "guards/step_000003.json").read_text())
    assert list(map(int, told["samples_by_sequence"])) == list(range(16, 24))
    assert all(told["samples_by_sequence"].values()) and told["policy"] == "skip"
    rank = 1 if what.startswith("output") else 0
    assert told["first_bad"].startswith("first not finite: the ")
    assert told["first_bad"].endswith(f"on rank {rank}"), told["first_bad"]
    assert ("output of module" if rank else "gradient of") in told["first_bad"]


def test_the_first_step_may_be_refused(config: Path, tmp_path: Path) -> None:
    more = ["checkpoint.every=1", "train.steps=2"]
    said = run_distributed(
        trained, 2, config=str(config), out=str(tmp_path), overrides=more, fault="output:rank=1:step=1:nan"
    )
    assert [one["code"] for one in said] == [0, 0] and sorted(curve(tmp_path)) == [2]


def test_policy_stop_names_the_way_on(config: Path, tmp_path: Path) -> None:
    more = ["guards.nonfinite=stop"]
    said = run_distributed(
        trained, 2, config=str(config), out=str(tmp_path), overrides=more, fault="output:rank=1:step=3:module=3:nan"
    )
    assert [one["code"] for one in said] == [5, 5] and said[0]["error"] == said[1]["error"]
    assert "guards.skip_sequences=[[16,24]]" in said[0]["error"] and "(Block) on rank 1" in said[0]["error"]
    more = ["guards.skip_sequences=[[16,24]]", "train.steps=4"]
    said = run_distributed(trained, 2, config=str(config), out=str(tmp_path), overrides=more)
    assert [one["code"] for one in said] == [0, 0]


def test_policy_rollback_leaves_the_batch_out(config: Path, tmp_path: Path) -> None:
    """The run goes on as one does whose config leaves the batch out from the start."""
    more = ["guards.nonfinite=rollback", "train.steps=6"]
    fault = "output:rank=1:sequence=28:nan"  # rank 1's half of step 4
    said = run_distributed(trained, 2, config=str(config), out=str(tmp_path / "a"), overrides=more, fault=fault)
    assert [one["code"] for one in said] == [0, 0] and said[0]["guards"]["left_out"] == [[24, 32]]
    more = ["guards.skip_sequences=[[24,32]]", "train.steps=6"]
    run_distributed(trained, 2, config=str(config), out=str(tmp_path / "b"), overrides=more)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert Checkpoint(tmp_path / "a/checkpoints/step_000006").state["guards"]["left_out"] == [[24, 32]]


def test_a_spike_is_skipped_and_counted_over_a_restart(config: Path, tmp_path: Path) -> None:
    more = ["guards.window=16", "guards.limit=2", "train.steps=20", "checkpoint.every=1", "optimizer.lr=1.0e-3"]
    fault = ";".join(f"loss:rank=1:step={step}:spike" for step in (10, 12, 14))
    said = run_distributed(
        trained, 2, config=str(config), out=str(tmp_path), overrides=[*more, "train.stop_at=12"], fault=fault
    )
    assert [one["code"] for one in said] == [0, 0] and said[1]["guards"]["refused"] == [10, 12]
    assert unchanged(tmp_path, 9, 10) and unchanged(tmp_path, 11, 12) and not unchanged(tmp_path, 10, 11)
    said = run_distributed(trained, 2, config=str(config), out=str(tmp_path), overrides=more, fault=fault)
    assert [one["code"] for one in said] == [5, 5] and "3 of the last 16 steps" in said[0]["error"]
    assert "is a spike" in said[0]["error"]


def test_steps_left_out_change_nothing(config: Path, tmp_path: Path) -> None:
    more = ["guards.skip_steps=[[2,4]]", "train.steps=4", "checkpoint.every=1"]
    run_distributed(trained, 1, config=str(config), out=str(tmp_path), overrides=more)
    assert sorted(curve(tmp_path)) == [1, 4] and unchanged(tmp_path, 1, 3)
    assert Checkpoint(tmp_path / "checkpoints/step_000004").state["guards"]["skip_steps"] == [[2, 4]]
