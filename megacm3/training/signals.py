"""SIGTERM and Ctrl-C become "finish the step, save, leave" on all ranks; a second signal leaves at once."""

import os
import signal
from types import FrameType

import torch
import torch.distributed as dist

from megacm3.errors import Stopped
from megacm3.parallel.context import ParallelContext


class StopRequest:
    """Listens from construction on; `agreed` is collective."""

    def __init__(self, context: ParallelContext) -> None:
        self._context, self._count = context, 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count > 1:
            os._exit(Stopped.exit_code)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Every rank must call it at the same step."""
        flag = torch.tensor([self._count])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._context.control_group)
        return bool(flag.item())
