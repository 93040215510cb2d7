"""The learning rate as a pure function of the step: nothing to store, nothing to step twice."""

import math

from megacm3.config import Config, total_steps


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of optimizer step `step` (0 = the first).

    Linear warm-up over `warmup` steps, then the decay over what is left: linear or cosine to final x peak, exponential
    (peak x final^t, t from 0 to 1; Chameleon 2.3 says "exponential" without a rate), or constant.
    """
    settings = config.optimizer.schedule
    peak, steps = config.optimizer.lr, total_steps(config)
    if step < settings.warmup:
        return peak * (step + 1) / settings.warmup
    done = min(1.0, (step - settings.warmup) / max(1, steps - settings.warmup))
    if settings.kind == "constant":
        return peak
    if settings.kind == "exponential":
        return peak * max(settings.final, 1e-8) ** done
    share = (1.0 + math.cos(math.pi * done)) / 2 if settings.kind == "cosine" else 1.0 - done
    return peak * (settings.final + (1.0 - settings.final) * share)
