"""Who is alive, where each rank stands, and how all leave together when one is lost, stalls or fails.

Every rank keeps one connection to rank 0, served by threads that go on while the main thread waits in a collective. A
rank that dies closes its connection at once; one that stalls falls silent or stays in a phase. Rank 0 decides, once,
and tells all: so the first error is the one that is printed, and everyone leaves with its exit code.
"""

import contextlib
import faulthandler
import json
import logging
import multiprocessing
import os
import secrets
import signal
import socket
import sys
import threading
import time
from multiprocessing.connection import Client, Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from megacm3.config import Config
from megacm3.errors import DataError, Megacm3Error, PeerLost
from megacm3.parallel.context import ParallelContext
from megacm3.training.hub import Hub, Verdict

log = logging.getLogger(__name__)
PHASES = ("start", "data", "forward", "backward", "optimizer", "evaluate", "save")
"""In the order of a step (a save evaluates a fixed batch, too); the pipeline takes forward and backward in turns."""
PATIENCE = 15.0
"""Seconds that a rank with an error waits for the verdict, rank 0 for the others to hear it, and a rank that has heard
it for its main thread."""
STACKS = 5.0
"""Seconds that writing them may take."""
_COLLECTIVE = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Broken pipe", "Timed out")


def is_peers_fault(error: BaseException) -> bool:
    """Whether an error is a collective's: another rank is the cause."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _COLLECTIVE)


def waits_for_others() -> bool:
    """Whether the main thread stands inside a call of torch.distributed."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if "torch/distributed/distributed_c10d" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


class Watchdog:
    """This rank's part of it. Building one is collective."""

    def __init__(self, config: Config, context: ParallelContext) -> None:
        self._rank, self._world = context.rank, context.world
        self._folder, self._settings = Path(config.train.out) / "stacks", config.watchdog
        timeout = config.watchdog.timeout
        self._beat = min(5.0, timeout / 10) if timeout else 5.0
        self._hub: Hub | None = None
        address: list[Any] = [None]
        if context.rank == 0:
            key = secrets.token_bytes(32)
            self._hub = Hub(context.world, key, config.watchdog)
            address = [(os.environ.get("MASTER_ADDR", "127.0.0.1"), self._hub.port, key)]
        dist.broadcast_object_list(address, src=0, group=context.control_group)
        host, port, key = address[0]
        try:
            self._connection: Connection = Client((host, port), authkey=key)
        except (OSError, EOFError) as fault:
            raise PeerLost(f"rank {self._rank} cannot reach rank 0 at {host}:{port} (MASTER_ADDR): {fault}") from fault
        # Forked loader processes must not hold the connection open when this one dies.
        os.register_at_fork(after_in_child=self._connection.close)
        self._lock, self._leaving, self._over = threading.Lock(), threading.Event(), threading.Event()
        self._verdict: Verdict | None = None
        self._stands = (0, "start", time.monotonic())
        self._last_word = time.monotonic()
        self._say(kind="hello", rank=context.rank, host=socket.gethostname(), pid=os.getpid())
        self._thread = threading.Thread(target=self._listen, name="watchdog", daemon=True)
        self._thread.start()

    def phase(self, name: str, step: int | None = None) -> None:
        """Note that this rank enters a phase; step: 1 = the first, by default the one it is in."""
        assert name in PHASES
        self._stands = (self._stands[0] if step is None else step, name, time.monotonic())

    def _say(self, **message: Any) -> None:
        # Where rank 0 is gone, the listening thread finds it out.
        with contextlib.suppress(OSError), self._lock:
            self._connection.send_bytes(json.dumps(message).encode())

    def _listen(self) -> None:
        while not self._over.is_set():
            try:
                if wait([self._connection], self._beat):
                    message = json.loads(self._connection.recv_bytes())
                    self._last_word = time.monotonic()
                    if message["kind"] == "verdict":
                        return self._obey(Verdict(**message["verdict"]))
                    if message["kind"] == "done":
                        return self._over.set()
            except (EOFError, OSError):
                return self._obey(self._without_rank_0("was lost: its process ended without a word"))
            step, phase, since = self._stands
            self._say(kind="beat", step=step, phase=phase, since=time.monotonic() - since, waits=waits_for_others())
            silent = time.monotonic() - self._last_word
            if self._settings.timeout and silent > self._settings.timeout:
                return self._obey(self._without_rank_0(f"has said nothing for {silent:.0f} s"))

    def _without_rank_0(self, what: str) -> Verdict:
        step, phase, _ = self._stands
        text = f"rank 0 {what}; rank {self._rank} was in {phase} of step {step}"
        return Verdict(PeerLost.exit_code, text, speaker=1, stacks=True)

    def _obey(self, verdict: Verdict) -> None:
        """Leave as the verdict says, unless the main thread itself waits for it in `leave`."""
        self._verdict = verdict
        if verdict.stacks:
            self._write_stacks()
        self._over.set()
        if self._leaving.is_set() or (verdict.origin >= 0 and self._comes_by_itself()):
            return
        if verdict.speaker == self._rank:
            print(f"error: {verdict.text}", file=sys.stderr, flush=True)
        self._exit(verdict.code)

    def _comes_by_itself(self) -> bool:
        """Whether the main thread reaches `leave`, as after an error that all ranks raise: it may be writing a report.

        Not awaited where it stands in a collective, which the others have left.
        """
        until = time.monotonic() + PATIENCE
        while not self._leaving.wait(0.1):
            if waits_for_others() or time.monotonic() > until:
                return False
        return True

    def _write_stacks(self) -> None:
        """In a thread of its own: the file system may be what stalls, and leaving must not wait for it."""
        writer = threading.Thread(target=self._stacks_to_file, name="stacks", daemon=True)
        writer.start()
        writer.join(STACKS)

    def _stacks_to_file(self) -> None:
        step, phase, _ = self._stands
        place = f"rank {self._rank}, process {os.getpid()}, {phase} of step {step}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / f"rank_{self._rank:05d}.txt", "w", encoding="utf-8") as file:
                file.write(f"{place}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as fault:
            log.warning("%s: no stacks in %s: %s; here they are", place, self._folder, fault.strerror)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)

    def _exit(self, code: int) -> NoReturn:
        """Out at once: the main thread may stand in a collective that never ends."""
        self._connection.close()  # the hub waits for all to hang up
        if self._hub is not None:
            self._hub.join(PATIENCE)
        for child in multiprocessing.active_children():
            child.kill()
        sys.stderr.flush()
        os._exit(code)

    def leave(self, error: BaseException) -> BaseException:
        """What this rank must end with because of an error: the job's first, silent where another rank prints it."""
        known = isinstance(error, Megacm3Error)
        code, text = (error.exit_code, str(error)) if isinstance(error, Megacm3Error) else (1, repr(error))
        if isinstance(error, OSError) and error.filename:  # as `command.run` tells it
            code, text = DataError.exit_code, f"{error.filename}: {error.strerror}"
        self._leaving.set()
        step, phase, _ = self._stands
        where = {"step": step, "phase": phase}
        self._say(kind="error", code=code, text=text, network=is_peers_fault(error), **where)
        self._over.wait(PATIENCE)
        verdict, end = self._verdict, error
        if verdict is not None and verdict.origin != self._rank:
            if not known or (verdict.code, verdict.text) != (code, text):
                kinds = {kind.exit_code: kind for kind in Megacm3Error.__subclasses__()}
                end = kinds.get(verdict.code, Megacm3Error)(verdict.text)
            assert isinstance(end, Megacm3Error)
            end.silent = verdict.speaker != self._rank
        self._hang_up()
        code = end.exit_code if isinstance(end, Megacm3Error) else code
        # Whatever still holds the process (a collective's thread, for example) must not keep it.
        last = threading.Timer(PATIENCE, os._exit, (code,))
        last.daemon = True
        last.start()
        return end

    def _hang_up(self) -> None:
        self._over.set()
        # Else torch's handler would take the end of a loader process, below, for a fault.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._thread.join(PATIENCE)
        self._connection.close()
        if self._hub is not None:
            self._hub.join(PATIENCE)
        for child in multiprocessing.active_children():
            child.kill()

    def leave_at_once(self, error: Megacm3Error) -> None:
        """The same from another thread, with no word from the main one."""
        self._say(
            kind="error", code=error.exit_code, text=str(error), network=False, step=0, phase="start", spoken=True
        )

    def close(self) -> None:
        """The work is done: say so, and wait until all have. Collective."""
        self._say(kind="bye")
        self._over.wait(PATIENCE)
        self._hang_up()
