"""Saves that are killed, fail or are refused; resuming bit for bit with everything on."""

from pathlib import Path

import pytest
import torch

from megacm3.checkpoint.commit import discover, leftovers
from tests.fault.test_guards import contents, zero
from tests.helpers.distributed import run_distributed
from tests.helpers.ranks import errors, make_config, start
from tests.helpers.trainer import curve, trained

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_config(tmp_path_factory.mktemp("saves"), retrieval=True)


def names(out: Path) -> list[str]:
    return [path.name for path in discover(out / "checkpoints")]


def test_a_rank_killed_while_it_writes(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    codes, said = start(config, out, "train.steps=6", fault="save.writing:rank=1:step=4:kill9").wait()
    assert codes == [6, -9] and "rank 1" in errors(said)[0] and "lost" in errors(said)[0], said
    assert names(out) == ["step_000002"] and leftovers(out / "checkpoints")
    codes, said = start(config, out, "train.steps=6", "checkpoint.resume=required").wait()
    assert codes == [0, 0] and ".step_000004.tmp, left by a save that did not finish" in said[0], said
    assert names(out) == ["step_000006", "step_000004", "step_000002"] and not leftovers(out / "checkpoints")
    run_distributed(trained, 2, config=str(config), out=str(tmp_path / "whole"), overrides=["train.steps=6"])
    assert curve(out) == curve(tmp_path / "whole")
    a, b = contents(out, 6), contents(tmp_path / "whole", 6)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("then", ["stop", "continue"])
def test_a_full_disk_in_a_save(config: Path, tmp_path: Path, then: str) -> None:
    more, fault = [f"checkpoint.on_failure={then}", "train.steps=6"], "save.writing:rank=1:step=4:full"
    said = run_distributed(trained, 2, config=str(config), out=str(tmp_path), overrides=more, fault=fault)
    assert [one["code"] for one in said] == ([4, 4] if then == "stop" else [0, 0]), said
    assert names(tmp_path) == (["step_000002"] if then == "stop" else ["step_000006", "step_000002"])
    assert not leftovers(tmp_path / "checkpoints")
    if then == "stop":
        assert said[0]["error"] == said[1]["error"] and "No space left on device" in said[0]["error"]


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(config: Path, tmp_path: Path) -> None:
    codes, said = start(config, Path("/proc/run"), ranks=1).wait(60)
    assert codes == [2] and "cannot be written" in errors(said)[0] and "train.out" in errors(said)[0], said


def test_a_folder_that_vanishes_fails_the_save_only(config: Path, tmp_path: Path) -> None:
    """The file that takes the folder's place stands for a mount that went away."""
    more = ["checkpoint.on_failure=stop", "checkpoint.every=0", "train.steps=2"]
    (tmp_path / "checkpoints").write_text("")
    said = run_distributed(trained, 2, config=str(config), out=str(tmp_path), overrides=more)
    assert [one["code"] for one in said] == [4, 4] and "cannot be written" in said[0]["error"]


@pytest.mark.parametrize("layout", [["parallel.tensor=2"], []], ids=["tensor", "data"])
def test_replicas_that_differ_stop_the_run_before_a_save(config: Path, tmp_path: Path, layout: list[str]) -> None:
    fault = "replica:rank=1:step=4:perturb"
    said = run_distributed(trained, 2, config=str(config), out=str(tmp_path), overrides=layout, fault=fault)
    assert [one["code"] for one in said] == [4, 4] and said[0]["error"] == said[1]["error"]
    assert "on rank 1 is not that of rank 0" in said[0]["error"] and ".weight" in said[0]["error"]
    assert names(tmp_path) == ["step_000002"]


BITWISE = {
    "zero1": [],
    "zero2": [zero(2)],
    "zero3": [zero(3)],
    "tp2": ["parallel.tensor=2"],
    "pp2": ["parallel.pipeline=2"],
}


@pytest.mark.parametrize("keys", BITWISE.values(), ids=BITWISE.keys())
def test_twenty_steps_after_a_resume_are_bitwise_the_unbroken_runs(
    config: Path, tmp_path: Path, keys: list[str]
) -> None:
    """Dropout, full recomputation, CM3 masks and retrieved documents on: losses, norms, samples, all of the state."""
    more = [*keys, "train.steps=24", "checkpoint.every=12", "data.workers=1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_distributed(trained, 2, config=str(config), out=str(whole), overrides=more)
    run_distributed(trained, 2, config=str(config), out=str(parts), overrides=[*more, "train.stop_at=4"])
    (first, _) = run_distributed(trained, 2, config=str(config), out=str(parts), overrides=more)
    assert first["code"] == 0 and len(curve(whole)) == 24
    assert curve(parts) == curve(whole)
    a, b = contents(whole, 24), contents(parts, 24)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_another_layout_reads_the_same_samples_and_sees_the_same_losses(config: Path, tmp_path: Path) -> None:
    more = ["train.steps=14", "optimizer.lr=1.0e-3"]
    run_distributed(trained, 2, config=str(config), out=str(tmp_path), overrides=more)
    unbroken = curve(tmp_path)
    for folder in (tmp_path / "checkpoints").glob("step_*"):
        if folder.name > "step_000004":
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    for layout in (["parallel.tensor=2", "train.stop_at=8"], ["parallel.pipeline=2", zero(1)]):
        said = run_distributed(trained, 2, config=str(config), out=str(tmp_path), overrides=[*more, *layout])
        assert [one["code"] for one in said] == [0, 0], said
    moved = curve(tmp_path)
    assert moved.keys() == unbroken.keys()
    for step, (loss, norm, samples) in unbroken.items():
        assert moved[step][2] == samples
        assert moved[step][0] == pytest.approx(loss, rel=1e-5) and moved[step][1] == pytest.approx(norm, rel=1e-3)
