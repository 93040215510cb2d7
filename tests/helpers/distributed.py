"""Runs a function on several ranks: `run_distributed(function, world_size, **kwargs) -> list of per-rank results`.

Importing torch, DeepSpeed and megatron-core costs seconds, so one process (tests/helpers/forker.py) does it once a
session and forks the ranks of every case. A case thus starts in milliseconds, begins with untouched module globals
(DeepSpeed's `cdb`, megatron-core's `parallel_state`, process groups), and takes nothing down with it when it crashes.
"""

import atexit
import functools
import inspect
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class RankError(AssertionError):
    """At least one rank raised, died or hung; the message has each rank's traceback, or stack, and output."""


def run_distributed(
    function: Callable[..., Any], world_size: int, *, timeout: float = 120.0, exits: bool = False, **kwargs: Any
) -> list[Any]:
    """Call `function(**kwargs)` on `world_size` ranks at once and return what each returned, by rank.

    The function must stand at the top level of its module; arguments and results must be picklable. Each rank has RANK,
    LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as from a launcher (loopback, a free port, DS_ACCELERATOR=cpu,
    no CUDA, one thread) and no process group yet. Raises `RankError` when a rank fails or `timeout` seconds are over.

    exits: the function is a command, which leaves the process; the results are (exit code, output), a killed rank is no
    failure (its code is the negative signal), and a process left behind by any is one.
    """
    if "<" in function.__qualname__:
        raise TypeError(f"{function.__qualname__} must be a function at the top level of its module")
    job = {
        "path": inspect.getfile(function),
        "module": function.__module__,
        "name": function.__qualname__,
        "kwargs": pickle.dumps(kwargs),
        "world_size": world_size,
        "timeout": timeout,
        "exits": exits,
    }
    ok, answer = _forker().run(job, timeout + 60.0)
    if not ok:
        raise RankError(answer)
    return [pickle.loads(result) for result in answer]


class _Forker:
    """The process that forks ranks, in a session of its own. It ends with this one, however this one ends."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.forker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
                env={**os.environ, **threads, **cpu},
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())

    def run(self, job: dict[str, Any], timeout: float) -> tuple[bool, Any]:
        """One case: (True, pickled results by rank) or (False, report)."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        try:
            self._connection.send(job)
            if self._connection.poll(timeout):
                ok, answer = self._connection.recv()
                return ok, answer
            problem = f"did not answer within {timeout:.0f} s"
        except (EOFError, ConnectionError):
            problem = "died"
        self.stop()
        return False, f"the process that forks the ranks {problem} while it ran {job['module']}.{job['name']}"

    def stop(self) -> None:
        """End it and every rank that it left."""
        if self._process is None:
            return
        self._connection.close()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            assert self._process.poll() is not None
        self._process.wait()
        self._process = None


@functools.cache
def _forker() -> _Forker:
    forker = _Forker()
    atexit.register(forker.stop)
    return forker
