"""metrics.jsonl: means over targets, one line a logged step, continued after a resume."""

import json
from pathlib import Path

import torch

from megacm3.config import Config
from megacm3.parallel.engine import StepResult
from megacm3.resolve import load_config
from megacm3.training.metrics import Metrics, step_metrics

SUMS = torch.tensor([100.0, 8.0, 4.0, 50.0, 60.0, 20.0, 36.0, 18.0], dtype=torch.float64)


def _config() -> Config:
    return load_config(None, ["model.preset=tiny_cm3leon", "train.steps=6", "log.every=2", "log.tensorboard=false"])


def _log(out: Path, first: int, last: int) -> None:
    metrics = Metrics(_config(), out, first, active=True)
    for step in range(first + 1, last + 1):
        metrics.add(step, StepResult(SUMS * step, 1.0, 1.0), 0.1, "ab", {"padding": 3}, step * 10)
    metrics.close()


def _steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_means_are_over_the_targets_of_each_kind() -> None:
    found = step_metrics(StepResult(SUMS, 0.5, 2.0))
    assert (found["loss"], found["loss_text"], found["loss_image"]) == (2.0, 3.0, 2.0)
    assert (found["z"], found["grad_norm"], found["output_norm"]) == (4.0 / 50, 0.5, 2.0)


def test_a_step_without_pictures_has_no_image_loss() -> None:
    sums = SUMS.clone()
    sums[6:] = 0
    assert step_metrics(StepResult(sums, 0.5, 2.0))["loss_image"] is None


def test_lines_are_written_for_first_last_and_every_nth_step(tmp_path: Path) -> None:
    _log(tmp_path, 0, 6)
    assert _steps(tmp_path) == [1, 2, 4, 6]
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    keys = "step loss loss_text loss_image z grad_norm lr tokens tokens_per_second samples".split()
    assert set(keys) <= line.keys()
    assert line["data_padding"] == 3


def test_resuming_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    _log(tmp_path, 0, 6)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    _log(tmp_path, 2, 6)
    assert _steps(tmp_path) == [1, 2, 4, 6]
