"""How long this rank's own forward passes take: what tells a slow rank from those that wait for it."""

import time
from typing import Any

import torch

from megacm3.faults import strike
from megacm3.parallel.context import ParallelContext


class ForwardClock:
    """Adds up the training's forward passes of a module since `reset`: by events on a GPU, by the clock elsewhere.

    Backward passes are left out: they hold the gradient's all-reduce, in which every rank waits for the slowest. What
    waits inside a forward pass remains: tensor ranks for one another, and at ZeRO stage 3 all data ranks.
    """

    def __init__(self, module: torch.nn.Module, context: ParallelContext) -> None:
        self._rank, self._cuda = context.rank, context.device.type == "cuda"
        self._marks: list[Any] = []
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()  # type: ignore[no-untyped-call]
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def _before(self, module: torch.nn.Module, *_: Any) -> None:
        if module.training:
            self._mark()
        strike("forward", rank=self._rank)

    def _after(self, module: torch.nn.Module, *_: Any) -> None:
        if module.training:
            self._mark()

    def reset(self) -> None:
        """Begin a new step."""
        self._marks.clear()

    def seconds(self) -> float:
        """Since `reset`. Waits for a GPU to finish them."""
        pairs = zip(self._marks[::2], self._marks[1::2], strict=False)
        if not self._cuda:
            return float(sum(after - before for before, after in pairs))
        torch.cuda.synchronize()
        return sum(before.elapsed_time(after) for before, after in pairs) / 1e3
