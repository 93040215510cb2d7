"""What a step left: one line in metrics.jsonl (the source of truth), one on the console, and TensorBoard, wandb."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from megacm3.config import Config, total_steps
from megacm3.files import new_file
from megacm3.parallel.engine import StepResult

log = logging.getLogger(__name__)


def step_metrics(result: StepResult) -> dict[str, float | None]:
    """Means over the targets of the global batch, in nats; None where a step had no target of that kind."""
    nll, square, log_z, count, text, texts, image, images = result.sums.tolist()

    def mean(total: float, number: float) -> float | None:
        return total / number if number else None

    return {
        "loss": mean(nll, count),
        "loss_text": mean(text, texts),
        "loss_image": mean(image, images),
        "z": mean(log_z, count),
        "z_square": mean(square, count),
        "grad_norm": result.grad_norm,
        "output_norm": result.output_norm,
    }


class Metrics:
    """Writes what rank 0 logs. On resume, lines after the resumed step are dropped: they will be written again."""

    def __init__(self, config: Config, out: Path, first_step: int, active: bool) -> None:
        self.config, self.active, self.steps = config, active, total_steps(config)
        self.path, self._board, self._wandb = out / "metrics.jsonl", None, None
        self._started, self._tokens, self._wait = time.monotonic(), 0, 0.0
        if not active:
            return
        _keep_until(self.path, first_step)
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)
        if config.log.wandb:
            import wandb

            self._wandb = wandb.init(project=config.log.wandb, dir=str(out), resume="allow", id=out.name)

    def waited(self, seconds: float) -> None:
        """Count time spent waiting for data."""
        self._wait += seconds

    def add(self, step: int, result: StepResult, lr: float, samples: str, counts: dict[str, int], tokens: int) -> None:
        """Log step `step` (1 = the first) if it is due. tokens: of all steps so far, padding included."""
        self._tokens += self.config.train.global_batch * self.config.model.sequence_length
        if not self.active or (step % self.config.log.every and step not in (1, self.steps)):
            return
        seconds = time.monotonic() - self._started
        line: dict[str, Any] = {"step": step} | step_metrics(result)
        line |= {
            "lr": lr,
            "tokens": tokens,
            "tokens_per_second": self._tokens / seconds,
            "data_wait": self._wait / seconds,
            "samples": samples,
        }
        line |= {f"data_{name}": value for name, value in counts.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        left = (self.steps - step) * self.config.train.global_batch * self.config.model.sequence_length
        log.info(
            "step %d/%d  loss %s  text %s  image %s  grad %.3f  lr %.2e  %.0f tokens/s  %s left",
            *(step, self.steps, *(_short(line[name]) for name in ("loss", "loss_text", "loss_image"))),
            *(line["grad_norm"], lr, line["tokens_per_second"], _clock(left / line["tokens_per_second"])),
        )
        self._started, self._tokens, self._wait = time.monotonic(), 0, 0.0

    def close(self) -> None:
        """Flush the sinks."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


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
