"""SIGTERM and Ctrl-C become "finish the step, save, leave" on all ranks; a second one later leaves at once."""

import os
import signal
import socket
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist

from megacm3.errors import Stopped
from megacm3.parallel.context import ParallelContext
from megacm3.training.watchdog import Watchdog

NUMBERS = (signal.SIGTERM, signal.SIGINT)
ONE = 1.0
"""Seconds within which signals count as one: a launcher and the terminal may both pass on the same wish."""


class StopRequest:
    """Listens from construction on; `agreed` is collective.

    Python runs signal handlers in the main thread only, which may stand in a collective for long. So a thread reads the
    bytes that the interpreter writes at once when a signal comes.
    """

    def __init__(self, context: ParallelContext, watchdog: Watchdog) -> None:
        self._context, self._watchdog, self._first = context, watchdog, 0.0
        self._heard, writing = socket.socketpair()
        writing.setblocking(False)
        self._writing = writing  # kept open
        signal.set_wakeup_fd(writing.fileno())
        for number in NUMBERS:
            signal.signal(number, _note)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _listen(self) -> None:
        while byte := self._heard.recv(1):
            if byte[0] not in NUMBERS:
                continue
            now = time.monotonic()
            self._first = self._first or now
            if now - self._first > ONE:
                text = "stopped at once by a second signal; what was committed before is whole"
                self._watchdog.leave_at_once(Stopped(text))
                threading.Timer(5.0, os._exit, (Stopped.exit_code,)).start()  # where rank 0 does not answer

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Every rank must call it at the same step."""
        flag = torch.tensor([int(self._first > 0)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._context.control_group)
        return bool(flag.item())


def _note(number: int, frame: FrameType | None) -> None:
    """The signal is counted by the listening thread."""
