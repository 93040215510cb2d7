"""Imports the heavy libraries once, then forks the ranks of each case of tests/helpers/distributed.py.

Forking is safe as long as this process has a single thread, which is asserted: with one thread for OpenMP and BLAS,
none of the imports starts another, and nothing is computed here.
"""

import contextlib
import ctypes
import faulthandler
import importlib
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

PRELOAD = (
    "torch.distributed",
    "deepspeed.pipe",
    "deepspeed.runtime.engine",
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel",
    "megatron.core.transformer",
)
GRACE_SECONDS = 2.0
"""How long the other ranks may go on after one has failed: enough for gloo to notice a lost peer."""
ORPHAN_SECONDS = 10.0
"""By then what the ranks started must be gone, too."""
OUTPUT_TAIL = 4000
"""Characters of a rank's output in a report."""


class Rank:
    """One forked rank, seen from the forker."""

    def __init__(self, rank: int, job: dict[str, Any], port: int, folder: str) -> None:
        self.rank, self.exits = rank, bool(job["exits"])
        self.output = Path(folder) / f"rank_{rank}.txt"
        self.result: bytes | None = None
        self.problem = ""
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            _be_rank(rank, job, port, self.output, Connection(theirs.detach()))
        theirs.close()
        self.connection = Connection(ours.detach())

    @property
    def running(self) -> bool:
        """Neither result nor problem yet."""
        return self.result is None and not self.problem

    def receive(self) -> None:
        """Take the result, the traceback, or the fact that the rank is gone."""
        try:
            ok, payload = self.connection.recv()
        except (EOFError, ConnectionError):
            _, status = os.waitpid(self.pid, 0)
            self.pid = 0
            code = os.waitstatus_to_exitcode(status)
            if self.exits:
                self.result = pickle.dumps((code, self.output.read_text(errors="replace")))
                return
            self.problem = f"died of {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
            return
        if ok:
            self.result = payload
        else:
            self.problem = payload

    def give_up(self, why: str) -> None:
        """Note where the rank hangs: its stacks go to its output."""
        os.kill(self.pid, signal.SIGUSR1)
        time.sleep(0.3)
        self.problem = f"{why}; its stacks are at the end of its output"

    def end(self) -> None:
        """Let a finished rank leave, kill another."""
        if self.pid:
            if self.result is not None:
                self.connection.send("leave")
            else:
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.connection.close()

    def report(self) -> str:
        """A paragraph for the reader of the failed test."""
        if self.result is not None:
            return f"rank {self.rank}: finished"
        text = self.output.read_text(errors="replace")[-OUTPUT_TAIL:]
        return f"rank {self.rank}: {self.problem.rstrip()}\n--- its output:\n{text.rstrip() or '(none)'}"


def _be_rank(rank: int, job: dict[str, Any], port: int, output: Path, connection: Connection) -> None:
    """The life of a forked rank; does not return."""
    if sys.platform == "linux":
        # Die with the forker: PR_SET_PDEATHSIG = 1 (sys/prctl.h).
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(sys.__stderr__)
    faulthandler.register(signal.SIGUSR1, sys.__stderr__, all_threads=True)
    world = str(job["world_size"])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, LOCAL_SIZE=world)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = 0
    os.register_at_fork(after_in_child=connection.close)  # its end tells that this rank is gone
    try:
        function = getattr(sys.modules[job["module"]], job["name"])
        connection.send((True, pickle.dumps(function(**pickle.loads(job["kwargs"])))))
        # Rank 0 holds the store of the process groups: nobody leaves before all are through.
        connection.recv()
    except EOFError:
        code = 1
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        if job["exits"]:
            traceback.print_exc()
        else:
            connection.send((False, traceback.format_exc()))
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _import(job: dict[str, Any]) -> None:
    """Import the function's module under the name that the test process knows it by, so that its classes pickle."""
    module = importlib.import_module(job["module"])
    here, there = Path(module.__file__ or "").resolve(), Path(job["path"]).resolve()
    assert here == there, f"{job['module']} is {here} here, {there} in the test"


def _reserved_port() -> socket.socket:
    """A bound socket that never listens: rank 0 may take its port, and nobody else on the machine is given it.

    A port that is merely known to be free can go to another process before rank 0 binds it. Then rank 1 joins the store
    of strangers, and they may wait for it for as long as their timeout.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def _orphans() -> list[str]:
    """End what the ranks of the case started and left running (it is this process's child now), and name it."""
    deadline, me = time.monotonic() + ORPHAN_SECONDS, psutil.Process()
    while (left := _living(me)) and time.monotonic() < deadline:
        time.sleep(0.05)
    told = [f"{child.pid} {' '.join(child.cmdline())}" for child in left]
    for child in left:
        child.kill()
    while me.children():
        os.waitpid(-1, 0)
    return told


def _living(parent: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in parent.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def _run(job: dict[str, Any], parent: Connection) -> tuple[bool, Any]:
    """Fork the ranks of one case and wait for them. The reports stand in the order in which the ranks failed."""
    _import(job)
    assert sys.platform != "linux" or len(os.listdir("/proc/self/task")) == 1
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder, _reserved_port() as reserved:
        port = int(reserved.getsockname()[1])
        ranks = [Rank(rank, job, port, folder) for rank in range(job["world_size"])]
        try:
            failed = _wait_for(ranks, job["timeout"], parent)
            report = "\n\n".join(rank.report() for rank in failed)
        finally:
            for rank in ranks:
                rank.end()
        orphans = _orphans()
        if orphans and job["exits"]:
            report += f"left behind {ORPHAN_SECONDS:.0f} s after the last rank had gone: {orphans}"
        return (False, report) if report else (True, [rank.result for rank in ranks])


def _wait_for(ranks: list[Rank], timeout: float, parent: Connection) -> list[Rank]:
    """Until every rank has given its result; those that failed, or were given up."""
    deadline = time.monotonic() + timeout
    failed: list[Rank] = []
    while running := {rank.connection: rank for rank in ranks if rank.running}:
        ready = wait([parent, *running], max(0.0, deadline - time.monotonic()))
        if parent in ready:
            sys.exit("the test process is gone")
        for connection in ready:
            rank = running[connection]  # type: ignore[index]
            rank.receive()
            if rank.problem:
                failed.append(rank)
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if not ready:
            why = f"was still running {GRACE_SECONDS:.0f} s after rank {failed[0].rank} failed" if failed else ""
            for rank in running.values():
                rank.give_up(why or f"was still running after {timeout:.0f} s")
            failed.extend(running.values())
    return failed


def main() -> None:
    parent = Connection(int(sys.argv[1]))
    if sys.platform == "linux":
        # What a rank leaves behind becomes a child of this process: PR_SET_CHILD_SUBREAPER = 36.
        ctypes.CDLL(None).prctl(36, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core's, about optional libraries
        for name in PRELOAD:
            importlib.import_module(name)
    while True:
        try:
            job = parent.recv()
        except EOFError:
            return
        try:
            answer = _run(job, parent)
        except Exception:
            answer = False, traceback.format_exc()
        parent.send(answer)


if __name__ == "__main__":
    main()
