"""What ends or spares a run whose numbers went wrong."""

import math

from megacm3.data.loader import Step
from megacm3.errors import Diverged
from megacm3.parallel.engine import StepResult


def check_finite(result: StepResult, step: int, batch: Step) -> None:
    """Raise Diverged, on every rank alike, when the loss or the gradient norm of a step is not finite."""
    loss = float(result.sums[0] / max(1.0, float(result.sums[3])))
    if math.isfinite(loss) and math.isfinite(result.grad_norm):
        return
    raise Diverged(
        f"step {step}: loss {loss}, gradient norm {result.grad_norm}; expected finite numbers. "
        f"Sequences {[int(n) for b in batch.micro_batches for n in b['numbers']]} were read on this rank. "
        "Resume from the last checkpoint with a lower optimizer.lr or optimizer.clip"
    )
