"""What spares or ends a run whose numbers go wrong: non-finite steps, loss spikes, growing outputs, ranges left out.

The engine asks before its optimizer step, when loss and gradients of the global batch are known, and all ranks agree;
so a step that is refused changes no parameter anywhere. All state is JSON and goes into the checkpoint.
"""

import copy
import logging
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacm3.config import Config
from megacm3.data.loader import Step
from megacm3.errors import Diverged
from megacm3.files import write_json
from megacm3.parallel.engine import NONFINITE, StepResult
from megacm3.training.culprit import find_culprit

if TYPE_CHECKING:
    from megacm3.training.run import Run

log = logging.getLogger(__name__)
DEVIATIONS = 1.4826
"""Median absolute deviations in one standard deviation of a normal distribution."""


class RollBack(Exception):
    """The wish to go on from the last checkpoint, leaving out the sequences [first, end)."""

    def __init__(self, first: int, end: int) -> None:
        super().__init__(f"sequences {first} to {end - 1}")
        self.first, self.end = first, end


class Guards:
    """One per run, the same on every rank."""

    def __init__(self, config: Config) -> None:
        self.config, self.settings = config, config.guards
        self.losses: list[float] = []
        """Of the last `window` applied steps."""
        self.norms: list[float] = []
        """Output norms since the last median was taken, at most `window`."""
        self.lowest = 0.0
        """Lowest median output norm of a window since the warm-up; 0 = none yet. Rises with each alarm."""
        self.refused: list[int] = []
        """Steps of the last `window` that were not applied."""
        self.left_out: list[list[int]] = []
        """Ranges of sequences that a rollback left out, beside those of the config."""

    def state(self) -> dict[str, Any]:
        """For the checkpoint: copies, since a save in the background writes them when the training is further on."""
        names = ("losses", "norms", "lowest", "refused", "left_out")
        return {name: copy.deepcopy(getattr(self, name)) for name in names} | {
            "skip_steps": self.settings.skip_steps,
            "skip_sequences": self.settings.skip_sequences,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` gave; what this run has left out or refused since stays so."""
        here = set(map(tuple, self.left_out))
        self.losses, self.norms, self.lowest = list(state["losses"]), list(state["norms"]), state["lowest"]
        # A step that is refused again after a rollback counts again: else the limit would never be reached.
        saved: Counter[int] = Counter(state["refused"])
        self.refused = sorted((saved | Counter(self.refused)).elements())
        self.left_out = [list(pair) for pair in sorted(here | set(map(tuple, state["left_out"])))]

    @property
    def skip_sequences(self) -> list[list[int]]:
        """All ranges [first, end) of sequences that are not read."""
        return [*self.settings.skip_sequences, *self.left_out]

    def leaves_out(self, step: int) -> bool:
        """Whether the config leaves out step `step` (1 = the first): its batch is read, nothing is trained."""
        if not any(first <= step < end for first, end in self.settings.skip_steps):
            return False
        log.info("step %d is left out (guards.skip_steps)", step)
        return True

    @property
    def limit(self) -> float:
        """The loss above which a step is a spike; infinite while too few are known."""
        if not self.settings.spike or len(self.losses) < max(8, self.settings.window // 4):
            return math.inf
        middle = statistics.median(self.losses)
        spread = statistics.median(abs(loss - middle) for loss in self.losses)
        return middle + self.settings.spike * DEVIATIONS * max(spread, 1e-3 * abs(middle))

    def is_spike(self, loss: float) -> bool:
        """Whether a step with this loss is not to be applied."""
        return loss > self.limit

    def passed(self, run: "Run", batch: Step, result: StepResult) -> bool:
        """Take note of the step just tried; False where it was refused. Collective.

        Raises Diverged, or RollBack, as the policy says.
        """
        step, window = run.step + 1, self.settings.window
        self.refused = [old for old in self.refused if old > step - window]
        if not result.refused:
            self.losses = [*self.losses, result.loss][-window:]
            self._watch_norm(run, step, result.output_norm)
            return True
        self.refused.append(step)
        self._handle(run, batch, result)
        return False

    def _handle(self, run: "Run", batch: Step, result: StepResult) -> None:
        step, nonfinite = run.step + 1, result.refused == NONFINITE
        policy = self.settings.nonfinite if nonfinite else "skip"
        if len(self.refused) > self.settings.limit:
            policy = "stop"
        if nonfinite:
            what = f"loss {result.loss}, gradients {'finite' if result.finite_gradients else 'not finite'}"
            culprit = find_culprit(run.engine, batch.micro_batches)
        else:
            what, culprit = f"loss {result.loss:.4f} is a spike; the limit was {self.limit:.4f}", ""
        end = batch.first_sequence + self.config.train.global_batch
        path = run.out / "guards" / f"step_{step:06d}.json"
        if run.is_main:
            self._dump(path, run, {"step": step, "what": what, "first_bad": culprit, "policy": policy}, batch, end)
            log.warning(
                "step %d refused: %s%s; policy %s; see %s", step, what, culprit and f"; {culprit}", policy, path
            )
        if policy == "rollback":
            raise RollBack(batch.first_sequence, end)
        if policy == "stop":
            count = f"{len(self.refused)} of the last {self.settings.window} steps were refused"
            raise Diverged(
                f"step {step}: {what}{culprit and '; ' + culprit}; {count} (guards.limit = {self.settings.limit}). "
                "No parameter was changed. Resume with a lower optimizer.lr or optimizer.clip, "
                f"or leave the batch out: guards.skip_sequences=[[{batch.first_sequence},{end}]]"
            )

    def _dump(self, path: Path, run: "Run", told: dict[str, Any], batch: Step, end: int) -> None:
        sequences = range(batch.first_sequence, end)
        samples = {str(number): list(run.stream.samples(number)) for number in sequences}
        try:
            write_json(path, told | {"samples_sha256": batch.samples_sha256, "samples_by_sequence": samples})
        except OSError as fault:  # a full disk must not end a training
            log.warning("%s could not be written: %s", path, fault.strerror)

    def _watch_norm(self, run: "Run", step: int, norm: float) -> None:
        """Chameleon's leading indicator: the norm of the last output grows long before the loss diverges (2.3)."""
        if not self.settings.output_norm or step <= self.config.optimizer.schedule.warmup:
            return
        self.norms.append(norm)
        if len(self.norms) < self.settings.window:
            return
        median = statistics.median(self.norms)
        self.norms = []
        if self.lowest and median > self.settings.output_norm * self.lowest:
            if run.is_main:
                log.warning(
                    "step %d: the output norm is %.3g, more than %g x its lowest since the warm-up (%.3g): the run may "
                    "diverge later; see model.qk_norm, objective.z_loss, optimizer.lr (guards.output_norm)",
                    *(step, median, self.settings.output_norm, self.lowest),
                )
            self.lowest = median
        self.lowest = min(self.lowest or median, median)
