"""What a step left: in metrics.jsonl (the source of truth), on the console, in TensorBoard, wandb, and the report."""

import contextlib
import dataclasses
import json
import logging
import os
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from megacm3.config import Config, total_steps
from megacm3.errors import Megacm3Error
from megacm3.files import new_file
from megacm3.parallel.engine import StepResult
from megacm3.planning.counts import flops_per_token
from megacm3.training.flops import peak_flops
from megacm3.training.ranks import Ranks
from megacm3.training.report import ReportWriter

log = logging.getLogger(__name__)


def step_metrics(result: StepResult) -> dict[str, Any]:
    """Means over the targets of the global batch, in nats; None where a step had no target of that kind."""
    nll, square, log_z, count, text, texts, image, images = result.sums.tolist()

    def mean(total: float, number: float) -> float | None:
        return total / number if number else None

    return {
        "loss": mean(nll, count),
        "loss_text": mean(text, texts),
        "loss_image": mean(image, images),
        "loss_position": [mean(*bucket) for bucket in result.positions.T.tolist()],
        "z": mean(log_z, count),
        "z_square": mean(square, count),
        "grad_norm": result.grad_norm,
        "output_norm": result.output_norm,
    }


class Metrics:
    """Writes what rank 0 logs. On resume, lines after the resumed step are dropped: they will be written again.

    A context: leaving it, also by an error, flushes everything and writes the report a last time.
    """

    def __init__(
        self, config: Config, out: Path, first_step: int, active: bool, ranks: Ranks | None = None, layout: str = ""
    ) -> None:
        """active: whether this rank writes. ranks: figures of all ranks; without, `add` is not collective."""
        self.config, self.active, self.steps, self._ranks = config, active, total_steps(config), ranks
        self.path, self._board, self._wandb = out / "metrics.jsonl", None, None
        self._started, self._first, self._wait, self._last_wait = time.monotonic(), first_step, 0.0, 0.0
        self._own = 0.0
        self._saved: dict[str, float] = {}
        self._held_out: dict[str, Any] = {}
        self._peak = peak_flops(ranks.device_name, config.train.dtype) if ranks else None
        self._flops, self._world = flops_per_token(config.model), ranks.world if ranks else 1
        if not active:
            return
        _keep_until(self.path, first_step)
        self._report = ReportWriter(out, {"layout": layout})
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)
        if config.log.wandb:
            self._wandb = _start_wandb(config, out)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        ending = "finished" if error is None else str(error) if isinstance(error, Megacm3Error) else repr(error)
        self.close(ending)

    def waited(self, seconds: float) -> None:
        """Count time spent waiting for a step's batch."""
        self._wait += seconds
        self._last_wait = seconds

    def saved(self, stall: float, total: float) -> None:
        """Note a committed save for the next line: seconds that training stood still, seconds until the commit."""
        self._saved = {"save_stall": stall, "save_total": total}

    def evaluated(self, found: dict[str, Any]) -> None:
        """Note held-out figures of the step that comes next, whose line is written in any case. All ranks alike.

        Their time is left out of the training's speed.
        """
        self._held_out = found
        self._started += found["held_out_seconds"]

    def due(self, step: int) -> bool:
        """Whether step `step` (1 = the first) is logged."""
        return bool(self._held_out) or step % self.config.log.every == 0 or step in (1, self.steps)

    def add(self, step: int, result: StepResult, lr: float, samples: str, counts: dict[str, int], tokens: int) -> None:
        """Log step `step` (1 = the first) if it is due. tokens: of all steps so far, padding included.

        Collective at the steps that are due.
        """
        if not self.due(step):
            return
        begun = time.monotonic()
        held_out, self._held_out = self._held_out, {}
        figures = self._ranks.gather(self._last_wait) if self._ranks else None
        if not self.active:
            return
        line: dict[str, Any] = (
            {"step": step} | step_metrics(result) | {"lr": lr, "tokens": tokens} | self._speed(step, begun)
        )
        line |= {"samples": samples} | {f"data_{name}": value for name, value in counts.items()}
        if self._ranks and figures:
            line |= figures.gains | {"memory": figures.memory, "forward_seconds": max(figures.forward)}
            slow = self._ranks.slow(figures)
            if slow:
                line["slow"] = slow
                log.warning("step %d: %s", step, slow)
        line |= self._saved | held_out
        self._saved = {}
        self._append(json.dumps(line) + "\n")
        self._send(line, step)
        log.info("%s", self.console(line))
        self._report.maybe()
        # A line counts from one line's beginning to the next one's: what this one took is the next one's log_share.
        self._started, self._first, self._wait, self._own = begun, step, 0.0, time.monotonic() - begun

    def _append(self, text: str) -> None:
        """A line, or nothing where the disk is full: that must not end a training."""
        whole = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as fault:
            log.warning("%s could not be written: %s; this step's line is lost", self.path, fault.strerror)
            with contextlib.suppress(OSError):
                os.truncate(self.path, whole)

    def _speed(self, step: int, now: float) -> dict[str, float | None]:
        """Over the steps since the last line, saves included. log_share: what writing the last line and report took."""
        seconds, steps = max(now - self._started, 1e-9), step - self._first
        tokens = steps * self.config.train.global_batch * self.config.model.sequence_length / seconds
        flops = tokens * self._flops / self._world
        return {
            "tokens_per_second": tokens,
            "step_seconds": seconds / max(1, steps),
            "flops_per_device": flops,
            "flops_utilization": flops / self._peak if self._peak else None,
            "data_wait": self._wait / seconds,
            "log_share": self._own / seconds,
        }

    def console(self, line: dict[str, Any]) -> str:
        """A line of metrics.jsonl for people."""
        left = (self.steps - line["step"]) * line["step_seconds"]
        losses = "  ".join(f"{name} {_short(line[key])}" for name, key in _LOSSES)
        used = line["flops_utilization"]
        parts = [
            f"step {line['step']}/{self.steps} ({line['step'] / self.steps:.1%})  {losses}",
            f"z {_short(line['z'])}  grad {line['grad_norm']:.3f}  lr {line['lr']:.2e}",
            f"{line['tokens_per_second']:.0f} tokens/s" + (f" ({used:.1%} of peak)" if used else ""),
        ]
        if "held_out_loss" in line:
            found = "  ".join(f"{name} {_short(line.get(f'held_out_{key}'))}" for name, key in _LOSSES)
            parts.append(f"held out: {found}")
        if "memory" in line:
            parts.append(f"{line['memory'] / 2**30:.1f} GiB")
        return "  ".join([*parts, f"data wait {line['data_wait']:.1%}", f"{_clock(left)} left"])

    def _send(self, line: dict[str, Any], step: int) -> None:
        """Numbers to TensorBoard and wandb; a list as one series an entry."""
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
        for name, values in ((name, values) for name, values in line.items() if isinstance(values, list)):
            numbers |= {f"{name}/{i}": value for i, value in enumerate(values) if value is not None}
        if self._board is not None:
            try:
                for name, value in numbers.items():
                    self._board.add_scalar(name, value, step)
            except OSError as fault:  # its own thread met a full disk
                log.warning("TensorBoard's events cannot be written any more: %s", fault.strerror)
                self._board = None
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self, ending: str = "finished") -> None:
        """Flush the sinks and write the report. ending: how the run ended, for the report."""
        if not self.active:
            return
        self._report.write(ending)
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


_LOSSES = (("loss", "loss"), ("text", "loss_text"), ("image", "loss_image"))


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _start_wandb(config: Config, out: Path) -> Any:
    """A wandb run that a resumed training goes on with."""
    import wandb

    known = out / "wandb_id"
    if not known.exists():
        with new_file(known) as path:
            path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return wandb.init(
        project=config.log.wandb, dir=str(out), id=known.read_text(), resume="allow", config=dataclasses.asdict(config)
    )


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(text)["step"] <= step:
                kept.append(text + "\n")
        except (json.JSONDecodeError, KeyError):
            continue  # the last line of a killed run may be cut
    with new_file(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
