"""metrics.jsonl: means over targets, one line a logged step, continued after a resume."""

import contextlib
import json
import logging
import resource
from pathlib import Path

import pytest
import torch

from megacm3.config import Config
from megacm3.evaluation.charts import read_lines
from megacm3.parallel.engine import StepResult
from megacm3.planning.counts import flops_per_token
from megacm3.resolve import load_config
from megacm3.training.flops import peak_flops
from megacm3.training.metrics import Metrics, step_metrics
from megacm3.training.ranks import Figures, slow_rank

SUMS = torch.tensor([100.0, 8.0, 4.0, 50.0, 60.0, 20.0, 36.0, 18.0], dtype=torch.float64)


KEYS = ["model.preset=tiny_cm3leon", "train.steps=6", "log.every=2"]


def _config() -> Config:
    return load_config(None, [*KEYS, "log.tensorboard=false"])


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


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result, path = StepResult(SUMS, 1.0, 1.0), tmp_path / "metrics.jsonl"
    limits, config = resource.getrlimit(resource.RLIMIT_FSIZE), load_config(None, [*KEYS, "log.tensorboard=true"])
    with Metrics(config, tmp_path, 0, active=True) as metrics:
        metrics.add(1, result, 0.1, "ab", {}, 10)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))  # 20 bytes find room
            with contextlib.suppress(OSError):
                metrics._board.flush()
            metrics.add(2, result, 0.1, "ab", {}, 20)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        metrics.add(4, result, 0.1, "ab", {}, 40)
    assert f"{path} could not be written: File too large" in caplog.text
    assert "TensorBoard's events cannot be written any more: File too large" in caplog.text
    assert [line["step"] for line in read_lines(path)] == [1, 4]


def test_loss_by_position_and_none_where_a_bucket_has_no_target() -> None:
    positions = torch.tensor([[8.0, 6.0, 0.0], [4.0, 2.0, 0.0]], dtype=torch.float64)
    assert step_metrics(StepResult(SUMS, 0.5, 2.0, positions))["loss_position"] == [2.0, 3.0, None]


def test_a_line_tells_speed_and_the_save_before_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Metrics(_config(), tmp_path, 0, active=True) as metrics:
        metrics.add(1, StepResult(SUMS, 1.0, 1.0), 0.1, "ab", {}, 10)
        metrics.saved(0.25, 3.5)
        metrics.add(2, StepResult(SUMS, 1.0, 1.0), 0.1, "ab", {}, 20)
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert "save_stall" not in first and (second["save_stall"], second["save_total"]) == (0.25, 3.5)
    assert second["flops_per_device"] == pytest.approx(
        second["tokens_per_second"] * flops_per_token(_config().model), rel=1e-9
    )
    assert second["flops_utilization"] is None and 0 < second["log_share"] < 1
    assert "step 2/6 (33.3%)  loss 2.0000  text 3.0000  image 2.0000  z 0.0800  grad 1.000" in caplog.text
    assert "of peak" not in caplog.text


def test_tensorboard_holds_what_the_lines_hold_and_drops_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = load_config(None, ["model.preset=tiny_cm3leon", "train.steps=6", "log.every=1"])
    positions = torch.tensor([[8.0, 6.0], [4.0, 2.0]], dtype=torch.float64)
    for first, last, scale in ((0, 4, 1.0), (2, 6, 2.0)):
        with Metrics(config, tmp_path, first, active=True) as metrics:
            for step in range(first + 1, last + 1):
                metrics.add(step, StepResult(SUMS, scale, 1.0, positions), 0.1, "ab", {}, step)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("grad_norm")] == [(s, 1.0 if s < 3 else 2.0) for s in range(1, 7)]
    assert [e.value for e in events.Scalars("loss_position/1")] == [3.0] * 6


def test_wandb_offline_and_a_resumed_run_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = load_config(None, ["model.preset=tiny_cm3leon", "train.steps=4", "log.every=1", "log.wandb=trial"])
    for first in (0, 2):
        with Metrics(config, tmp_path, first, active=True) as metrics:
            assert metrics._wandb is not None and metrics._wandb.id == (tmp_path / "wandb_id").read_text()
            metrics.add(first + 1, StepResult(SUMS, 1.0, 1.0), 0.1, "ab", {}, 1)
    written = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(written) == 2 and all(b"loss_image" in path.read_bytes() for path in written)


def test_an_error_in_the_loop_ends_the_report_with_its_words(tmp_path: Path) -> None:
    from megacm3.errors import Diverged

    with pytest.raises(Diverged), Metrics(_config(), tmp_path, 0, active=True) as metrics:
        metrics.add(1, StepResult(SUMS, 1.0, 1.0), 0.1, "ab", {}, 10)
        raise Diverged("step 2: loss nan")
    page = (tmp_path / "report.html").read_text()
    assert "step 2: loss nan" in page and page.rstrip().endswith("</html>")


@pytest.mark.parametrize(
    ("device", "dtype", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA A100-SXM4-80GB", "fp32", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bf16", None),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA GH200 480GB", "bf16", None),
        ("", "bf16", None),
    ],
)
def test_a_peak_is_known_or_not_said(device: str, dtype: str, teraflops: float | None) -> None:
    assert peak_flops(device, dtype) == (teraflops * 1e12 if teraflops else None)


@pytest.mark.parametrize(
    ("forward", "wait", "stage_size", "slow"),
    [
        ([1.0, 1.1, 2.0, 1.0], [0.0] * 4, 4, "rank 2 on c is slow: forward pass 2.00 s, its peers 1.00 s"),
        ([1.0, 1.1], [0.0, 2.5], 2, "rank 1 on b is slow: wait for data 2.50 s, its peers 0.00 s"),
        ([0.01, 0.09], [0.0, 0.0], 2, ""),  # noise of small steps
        ([1.0, 1.0, 3.0, 3.0], [0.0] * 4, 2, ""),  # the last stage has the head
        ([1.0, 1.0, 3.0, 9.0], [0.0] * 4, 2, "rank 3 on d is slow: forward pass 9.00 s, its peers 3.00 s"),
        ([5.0], [1.0], 1, ""),
    ],
)
def test_a_slow_rank_is_named(forward: list[float], wait: list[float], stage_size: int, slow: str) -> None:
    assert slow_rank(Figures(forward, wait, 0, {}), list("abcd"), stage_size) == slow
