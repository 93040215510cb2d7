"""Faults on purpose, for tests and drills: the one place that reads MEGACM3_FAULT.

    MEGACM3_FAULT="save.before_fsync:rank=1:step=4:kill9"

Points are named where `strike` is called. Conditions that are left out match everything. Actions: kill9, sigterm,
sleep=SECONDS, raise, full (disk), or any other word, which `strike` returns to its caller. Several faults are separated
by semicolons.
"""

import errno
import os
import signal
import time
from typing import TYPE_CHECKING, Any

from megacm3.errors import DataError

if TYPE_CHECKING:
    import torch

VARIABLE = "MEGACM3_FAULT"
BAD = {"nan": float("nan"), "inf": float("inf")}


def strike(point: str, **where: int) -> str:
    """Carry out the faults set for `point`; return the action that the caller must carry out, "" for none."""
    for fault in os.environ.get(VARIABLE, "").split(";"):
        name, *fields = fault.strip().split(":")
        if name != point or not fields:
            continue
        *conditions, action = fields
        wanted = dict(condition.partition("=")[::2] for condition in conditions)
        if any(str(where.get(key)) != value for key, value in wanted.items()):
            continue
        if action == "kill9":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
            return ""
        if action == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if action == "raise":
            raise DataError(f"a fault on purpose at {point}")
        if action.startswith("sleep="):
            time.sleep(float(action.removeprefix("sleep=")))
            return ""
        return action
    return ""


class Poison:
    """Spoils a training step: points `batch` and `loss`, and by hooks `output` and `gradient` (nan, inf).

    Conditions: rank, step, sequence (the rank's first of the step), module or parameter (their number). Hooks strike
    once a micro-batch, those of outputs again where a module is recomputed, and never in an evaluation. No hook is
    installed where the variable does not name its point.
    """

    def __init__(self, module: "torch.nn.Module", rank: int) -> None:
        self.rank, self.step, self.sequence = rank, 0, 0
        names = [fault.strip().split(":")[0] for fault in os.environ.get(VARIABLE, "").split(";")]
        parts = getattr(module, "stages", None) or module.children()
        for index, part in enumerate(parts if "output" in names else ()):
            part.register_forward_hook(self._output(index))
        for index, parameter in enumerate(module.parameters() if "gradient" in names else ()):
            parameter.register_hook(self._gradient(index))

    @property
    def _where(self) -> dict[str, int]:
        return {"rank": self.rank, "step": self.step, "sequence": self.sequence}

    def batch(self, sequence: int) -> None:
        """A step begins with the rank's sequence `sequence`."""
        self.sequence = sequence
        strike("batch", **self._where)

    def loss(self, sums: "torch.Tensor") -> None:
        """The sums of the rank's losses are about to be brought together; `spike` makes them ten times larger."""
        if strike("loss", **self._where) == "spike":
            sums[0] *= 10

    def _output(self, index: int) -> Any:
        def hook(part: Any, inputs: Any, outputs: Any) -> Any:
            if not part.training:
                return None
            action = strike("output", **self._where, module=index)
            if action not in BAD:
                return None
            first, rest = (outputs[0], outputs[1:]) if isinstance(outputs, tuple) else (outputs, None)
            first = first * BAD[action]
            return first if rest is None else (first, *rest)

        return hook

    def _gradient(self, index: int) -> Any:
        def hook(gradient: "torch.Tensor") -> Any:
            action = strike("gradient", **self._where, parameter=index)
            return gradient * BAD[action] if action in BAD else None

        return hook
