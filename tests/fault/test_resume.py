"""Faults 8 and 9: a run that goes on with other ranks, or in another layout, is the same run."""

from pathlib import Path

import pytest

from tests.helpers.runs import differing, finished, lines, train_ranks, write_config
from tests.helpers.tools import run_tool

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Adam at a high rate turns the rounding of sums in another order into visible differences.
    optimizer = "{lr: 1.0e-3, schedule: {warmup: 2}}"
    return write_config(tmp_path_factory.mktemp("resume"), optimizer=optimizer)


@pytest.fixture(scope="module")
def unbroken(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In one process."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    finished(train_ranks(config, out, ranks=1))
    return out


def assert_alike(out: Path, unbroken: Path) -> None:
    """The same samples in every step; losses and gradient norms within what sums in another order make in fp32."""
    assert [line["samples"] for line in lines(out)] == [line["samples"] for line in lines(unbroken)]
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        found, expected = ([line[name] for line in lines(run)] for run in (out, unbroken))
        assert found == pytest.approx(expected, rel=tolerance), name


def test_08_resumed_on_one_two_four_ranks_and_back(config: Path, unbroken: Path, tmp_path: Path) -> None:
    for stop, ranks in ((2, 1), (4, 2), (6, 4), (8, 1)):
        finished(train_ranks(config, tmp_path / "run", f"train.stop_at={stop}", ranks=ranks))
    assert_alike(tmp_path / "run", unbroken)


MOVES = {
    "tp1-to-tp2": ("", "parallel.tensor=2"),
    "tp2-to-tp1": ("parallel.tensor=2", ""),
    "pp1-to-pp2": ("", "parallel.pipeline=2"),
    "pp2-to-pp1": ("parallel.pipeline=2", ""),
}


@pytest.mark.parametrize(("before", "after"), MOVES.values(), ids=MOVES)
def test_09_resumed_in_another_layout_after_reshard(
    before: str, after: str, config: Path, unbroken: Path, tmp_path: Path
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    layouts = [[words] if words else [] for words in (before, after)]
    finished(train_ranks(config, old, "train.stop_at=4", *layouts[0], ranks=2))
    degrees = {"parallel.tensor=2": (2, 1), "parallel.pipeline=2": (1, 2), "": (1, 1)}[after]
    step = old / "checkpoints/step_000004"
    target = new / "checkpoints/step_000004"
    arguments = ("--checkpoint", step, "--output", target, "--tensor", degrees[0], "--pipeline", degrees[1])
    assert run_tool("convert_checkpoint", "reshard", *arguments) == (0, "")
    # Parameters (q and k norms among them) and both of Adam's moments.
    assert not differing(step, target)
    finished(train_ranks(config, new, "checkpoint.resume=required", *layouts[1], ranks=2))
    (new / "metrics.jsonl").write_text((old / "metrics.jsonl").read_text() + (new / "metrics.jsonl").read_text())
    assert_alike(new, unbroken)
