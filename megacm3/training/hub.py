"""The watchdog's seat of judgement, two threads of rank 0: hears all ranks, and decides once how the job ends."""

import contextlib
import dataclasses
import json
import logging
import queue
import socket
import threading
import time
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from typing import Any

from megacm3.config import WatchdogConfig
from megacm3.errors import PeerLost

log = logging.getLogger(__name__)
GRACE = 2.0
"""Seconds in which the cause of a failed collective may show itself as a dead rank or as another error."""
_ORDER = {"start": 0, "data": 1, "forward": 2, "backward": 2, "optimizer": 3, "evaluate": 4, "save": 4}


@dataclass(frozen=True)
class Verdict:
    """How a job ends."""

    code: int
    text: str
    origin: int = -1
    """The rank whose own error it is; -1 where the ranks only hear of it."""
    speaker: int = -1
    """The rank that prints it, where no rank raised it."""
    stacks: bool = False
    """Whether every rank writes its stacks."""


@dataclass
class _Peer:
    rank: int
    place: str
    """host, process"""
    heard: float
    step: int = 0
    phase: str = "start"
    since: float = 0.0
    """Seconds in the phase, when last heard."""
    waits: bool = False
    warned: tuple[int, str] = (-1, "")

    @property
    def progress(self) -> tuple[int, int, bool]:
        """Who has the least holds up the others; within a phase, who does not wait."""
        return self.step, _ORDER[self.phase], self.waits

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.place})"


class Hub:
    """Serves the connections of all ranks until all have said goodbye or a verdict is given."""

    def __init__(self, world: int, key: bytes, settings: WatchdogConfig) -> None:
        self._world, self._key, self._settings = world, key, settings
        self._door = socket.create_server(("", 0), backlog=world)
        self._door.settimeout(0.1)
        self.port = self._door.getsockname()[1]
        """Where ranks connect, with multiprocessing's `Client` and the key."""
        self._arrived: queue.SimpleQueue[tuple[Any, dict[str, Any]]] = queue.SimpleQueue()
        self._peers: dict[Any, _Peer] = {}
        self._suspect: tuple[float, Verdict] | None = None
        self._interval = min(1.0, settings.timeout / 20) if settings.timeout else 1.0
        self._thread = threading.Thread(target=self._serve, name="watchdog-hub", daemon=True)
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait until every rank has heard the end."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _serve(self) -> None:
        verdict, last = self._admit(), 0.0
        connection: Any
        while verdict is None and self._peers:
            for connection in wait(list(self._peers), self._interval):
                verdict = verdict or self._hear(connection)
            verdict = verdict or self._judge()
            if verdict is None and time.monotonic() - last > self._interval:
                last = time.monotonic()
                self._tell({"kind": "beat"})
        if verdict is not None:
            self._tell({"kind": "verdict", "verdict": dataclasses.asdict(verdict)})
        self._drain()

    def _admit(self) -> Verdict | None:
        """Wait until every rank has said hello; a verdict where some do not come in time."""
        begun, verdict = time.monotonic(), None
        while verdict is None and len(self._peers) < self._world:
            with contextlib.suppress(OSError):  # nobody there, or gone already
                newcomer = Connection(self._door.accept()[0].detach())
                threading.Thread(target=self._greet, args=(newcomer,), name="watchdog-door", daemon=True).start()
            while not self._arrived.empty():
                connection, hello = self._arrived.get()
                place = f"{hello['host']}, process {hello['pid']}"
                self._peers[connection] = _Peer(hello["rank"], place, time.monotonic())
            if self._settings.timeout and time.monotonic() - begun > self._settings.timeout:
                missing = sorted(set(range(self._world)) - {peer.rank for peer in self._peers.values()})
                names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
                text = f"of {self._world} ranks these did not connect to rank 0 after the start: {names}"
                verdict = Verdict(PeerLost.exit_code, text, speaker=0, stacks=True)
        self._door.close()
        return verdict

    def _greet(self, newcomer: Any) -> None:
        """A thread for each: a stranger (something that tries every port) may say nothing for ever."""
        try:
            deliver_challenge(newcomer, self._key)
            answer_challenge(newcomer, self._key)
            self._arrived.put((newcomer, json.loads(newcomer.recv_bytes())))
        except (AuthenticationError, EOFError, OSError):
            newcomer.close()

    def _tell(self, message: dict[str, Any]) -> None:
        for connection in self._peers:
            try:
                connection.send_bytes(json.dumps(message).encode())
            except OSError:
                continue  # its end is heard in its turn

    def _drain(self) -> None:
        """Read until all have hung up: closing earlier could take back what they have not read."""
        until = time.monotonic() + 10.0
        connection: Any
        while self._peers and time.monotonic() < until:
            for connection in wait(list(self._peers), 0.2):
                try:
                    connection.recv_bytes()
                except (EOFError, OSError):
                    del self._peers[connection]

    def _hear(self, connection: Any) -> Verdict | None:
        peer = self._peers[connection]
        try:
            message = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            del self._peers[connection]
            text = (
                f"{peer} was lost: its process ended without a word; last heard of in {peer.phase} of step {peer.step}"
            )
            return Verdict(PeerLost.exit_code, text, speaker=0)
        peer.heard = time.monotonic()
        if message["kind"] == "beat":
            peer.step, peer.phase = message["step"], message["phase"]
            peer.since, peer.waits = message["since"], message["waits"]
        elif message["kind"] == "bye":
            connection.send_bytes(json.dumps({"kind": "done"}).encode())
            del self._peers[connection]
            connection.close()
        elif message["kind"] == "error":
            where = f"in {message['phase']} of step {message['step']}"
            if message["network"]:
                text = f"{peer} lost its connection to the others {where}: {message['text']}"
                self._suspect = self._suspect or (time.monotonic(), Verdict(PeerLost.exit_code, text, speaker=0))
            else:
                spoken = message.get("spoken", False)
                origin, speaker = (-1, peer.rank) if spoken else (peer.rank, -1)
                return Verdict(message["code"], message["text"], origin=origin, speaker=speaker)
        return None

    def _judge(self) -> Verdict | None:
        if self._suspect is not None:
            since, verdict = self._suspect
            return verdict if time.monotonic() - since > GRACE else None
        now, timeout = time.monotonic(), self._settings.timeout
        for peer in self._peers.values():
            silent = now - peer.heard
            if timeout and silent > timeout:
                text = f"{peer} has said nothing for {silent:.0f} s; it was in {peer.phase} of step {peer.step}"
                return Verdict(PeerLost.exit_code, text, speaker=0, stacks=True)
        return self._stalled()

    def _stalled(self) -> Verdict | None:
        working = [peer for peer in self._peers.values() if peer.phase != "start"]
        if len(working) < len(self._peers) or not working:
            return None
        least = min(peer.progress for peer in working)
        slow = [peer for peer in working if peer.progress == least]
        peer = max(slow, key=lambda peer: peer.since)
        names = f"{peer} is" if len(slow) == 1 else f"ranks {', '.join(str(p.rank) for p in slow[:8])} are"
        text = f"{names} in {peer.phase} of step {peer.step} for {peer.since:.0f} s"
        if self._settings.timeout and peer.since > self._settings.timeout:
            told = "stacks of all ranks are in stacks/ of train.out; the limit is watchdog.timeout"
            return Verdict(PeerLost.exit_code, f"{text}; {told}", speaker=0, stacks=True)
        here = (peer.step, peer.phase)
        if (
            len(slow) < len(working)
            and self._settings.warn
            and peer.since > self._settings.warn
            and peer.warned != here
        ):
            peer.warned = here
            log.warning("%s; the others wait (watchdog.warn)", text)
        return None
