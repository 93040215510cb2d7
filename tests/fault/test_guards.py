"""Faults 12 to 14: a number goes wrong on one rank. All agree, no parameter changes, batch and module are named."""

import json
from pathlib import Path
from typing import Any

import pytest

from megacm3.checkpoint.commit import discover
from megacm3.checkpoint.reader import Checkpoint
from tests.helpers.distributed import ROOT
from tests.helpers.runs import curve, differing, finished, lines, the_error, train_ranks, write_config

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("guards"))


def unchanged(out: Path, before: int, after: int) -> bool:
    """Whether parameters, masters and moments of two steps are bitwise equal."""
    return not differing(*(out / f"checkpoints/step_{step:06d}" for step in (before, after)))


def guards(out: Path) -> dict[str, Any]:
    """What the newest checkpoint holds of the guards."""
    state: dict[str, Any] = Checkpoint(discover(out / "checkpoints")[0]).state["guards"]
    return state


def steps(out: Path) -> list[int]:
    """The steps that were applied."""
    return [line["step"] for line in lines(out)]


def zero(stage: int) -> str:
    return f"deepspeed={ROOT}/ds_configs/zero{stage}.json"


LAYOUTS = {
    "zero0": (2, [zero(0)]),
    "zero0-bf16": (2, [zero(0), "train.dtype=bf16"]),
    "zero1": (2, []),
    "zero1-bf16": (2, ["train.dtype=bf16"]),
    "zero2-bf16": (2, [zero(2), "train.dtype=bf16"]),
    "zero3": (2, [zero(3)]),
    "tp2": (2, ["parallel.tensor=2"]),
    "tp2-bf16": (2, ["parallel.tensor=2", "train.dtype=bf16"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "pp2-bf16": (2, ["parallel.pipeline=2", "train.dtype=bf16"]),
    "tp2-pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
}


NAN, INF = "output:rank=1:step=3:nan", "gradient:rank=0:step=3:parameter=1:inf"


def refused(config: Path, out: Path, layout: str, fault: str) -> str:
    """Train four steps with a fault in the third: no rank updates in it. What the file about it names as first bad."""
    world, keys = LAYOUTS[layout]
    finished(train_ranks(config, out, *keys, "checkpoint.every=1", "train.steps=4", ranks=world, fault=fault))
    assert guards(out)["refused"] == [3] and steps(out) == [1, 2, 4]
    assert unchanged(out, 2, 3) and not unchanged(out, 3, 4)
    told = json.loads((out / "guards/step_000003.json").read_text())
    assert list(map(int, told["samples_by_sequence"])) == list(range(16, 24))
    assert all(told["samples_by_sequence"].values()) and told["policy"] == "skip"
    return str(told["first_bad"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_12_a_nan_on_one_rank(layout: str, config: Path, tmp_path: Path) -> None:
    """On rank 1: the last stage of a pipeline, a tensor rank, a data rank."""
    culprit = refused(config, tmp_path, layout, NAN)
    assert culprit.startswith("first not finite: the output of module") and culprit.endswith("on rank 1"), culprit


@pytest.mark.parametrize("layout", ["zero1", "zero3", "tp2", "pp2", "pp2-bf16"])
def test_13_an_infinite_gradient_on_one_rank(layout: str, config: Path, tmp_path: Path) -> None:
    """On rank 0: the first stage of a pipeline, one tensor rank."""
    culprit = refused(config, tmp_path, layout, INF)
    assert culprit.startswith("first not finite: the gradient of") and culprit.endswith("on rank 0"), culprit


@pytest.mark.parametrize("layout", ["zero1", "zero1-bf16"])
def test_12_the_first_step_may_be_refused(layout: str, config: Path, tmp_path: Path) -> None:
    keys = [*LAYOUTS[layout][1], "checkpoint.every=1", "train.steps=2"]
    finished(train_ranks(config, tmp_path, *keys, fault="output:rank=1:step=1:nan"))
    assert steps(tmp_path) == [2]


def test_12_policy_stop_names_the_way_on(config: Path, tmp_path: Path) -> None:
    said = train_ranks(config, tmp_path, "guards.nonfinite=stop", fault="output:rank=1:step=3:module=3:nan")
    error = the_error(said, 5)
    assert "guards.skip_sequences=[[16,24]]" in error and "on rank 1" in error, error
    said = train_ranks(config, tmp_path, "guards.skip_sequences=[[16,24]]", "train.stop_at=4")
    finished(said)
    assert "resumed " in said[0].log and steps(tmp_path) == [1, 2, 3, 4]


def test_12_policy_rollback_leaves_the_batch_out(config: Path, tmp_path: Path) -> None:
    """The run goes on as one does whose config leaves the batch out from the start."""
    fault = "output:rank=1:sequence=28:nan"  # rank 1's half of step 4
    finished(train_ranks(config, tmp_path / "a", "guards.nonfinite=rollback", "train.steps=6", fault=fault))
    assert guards(tmp_path / "a")["left_out"] == [[24, 32]]
    finished(train_ranks(config, tmp_path / "b", "guards.skip_sequences=[[24,32]]", "train.steps=6"))
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


def test_12_a_rollback_does_not_cure_what_stays(config: Path, tmp_path: Path) -> None:
    keys = ["guards.nonfinite=rollback", "guards.limit=2", "train.steps=6"]
    error = the_error(train_ranks(config, tmp_path, *keys, fault="output:rank=1:step=4:nan"), 5)
    assert "3 of the last 100 steps were refused" in error


def test_12_the_save_under_way_is_kept_when_the_run_diverges(config: Path, tmp_path: Path) -> None:
    fault = "save.before_write:rank=1:step=2:sleep=3;output:rank=1:step=3:nan"
    the_error(train_ranks(config, tmp_path, "guards.nonfinite=stop", fault=fault), 5)
    assert [path.name for path in discover(tmp_path / "checkpoints")] == ["step_000002"]


def test_14_a_spike_is_skipped_and_counted_over_a_restart(config: Path, tmp_path: Path) -> None:
    keys = ["guards.window=16", "guards.limit=2", "train.steps=20", "checkpoint.every=1", "optimizer.lr=1.0e-3"]
    fault = ";".join(f"loss:rank=1:step={step}:spike" for step in (10, 12, 14))
    finished(train_ranks(config, tmp_path, *keys, "train.stop_at=12", fault=fault))
    assert guards(tmp_path)["refused"] == [10, 12]
    assert unchanged(tmp_path, 9, 10) and unchanged(tmp_path, 11, 12) and not unchanged(tmp_path, 10, 11)
    error = the_error(train_ranks(config, tmp_path, *keys, fault=fault), 5)
    assert "3 of the last 16 steps" in error and "is a spike" in error


def test_14_steps_left_out_change_nothing(config: Path, tmp_path: Path) -> None:
    keys = ["guards.skip_steps=[[2,4]]", "train.steps=4", "checkpoint.every=1"]
    finished(train_ranks(config, tmp_path, *keys, ranks=1))
    assert steps(tmp_path) == [1, 4] and unchanged(tmp_path, 1, 3)
    assert guards(tmp_path)["skip_steps"] == [[2, 4]]
