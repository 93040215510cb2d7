"""One job a folder: `.lock` names the host and process that writes there."""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from megacm3.errors import ConfigError
from megacm3.files import read_json

log = logging.getLogger(__name__)
TOUCH = 10.0
"""Seconds between two signs of life in the lock's time stamp."""


def _begun(pid: int) -> str:
    """When a process of this machine began, in clock ticks since boot; "" where there is none (or it is a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


class FolderLock:
    """Held from `acquire` to `release`. One rank of a job holds it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "begun": _begun(os.getpid()),
            "token": secrets.token_hex(8),
        }
        self._end = threading.Event()

    def acquire(self) -> None:
        """Take the lock, over from a dead job if need be. Raises ConfigError naming a living one's host and process."""
        note = self.path.with_name(f".lock.{self._mine['token']}")
        note.write_text(json.dumps(self._mine) + "\n", encoding="utf-8")
        try:
            while True:
                try:
                    os.link(note, self.path)  # with its content, or not at all
                    break
                except FileExistsError:
                    self._take_over()
        finally:
            note.unlink()
        threading.Thread(target=self._stay_alive, name="lock", daemon=True).start()

    def release(self) -> None:
        """Give it back, if it is still ours."""
        self._end.set()
        with contextlib.suppress(OSError):  # it would hide the error that the run ends with
            if self._holder().get("token") == self._mine["token"]:
                self.path.unlink()

    def _holder(self) -> dict[str, Any]:
        return self._read(self.path)

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            found = read_json(path, error=ConfigError)
        except ConfigError:
            return {}
        return found if isinstance(found, dict) else {}

    def _take_over(self) -> None:
        holder = self._holder()
        who = f"process {holder.get('pid')} on {holder.get('host')}"
        if holder and self._lives(holder):
            raise ConfigError(
                f"{self.path.parent} is in use by {who}; stop that job first, or give another train.out "
                f"(if you know that it is dead, remove {self.path})"
            )
        # Of several heirs one gets the dead lock away; who gets the lock that an heir has just made gives it back.
        aside = self.path.with_name(f".lock.{self._mine['token']}.dead")
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.path, aside)
            if self._read(aside) == holder:
                if holder:
                    log.warning("%s is dead and left %s: taken over", who, self.path)
            else:
                os.link(aside, self.path)
            aside.unlink()

    def _lives(self, holder: dict[str, Any]) -> bool:
        if holder.get("host") == self._mine["host"]:
            return bool(holder.get("begun")) and _begun(int(holder.get("pid", 0))) == holder.get("begun")
        # Another machine's processes cannot be seen; its sign of life can.
        log.info("waiting for a sign of life of process %s on %s", holder.get("pid"), holder.get("host"))
        before, until = self._stamp(), time.monotonic() + 3.5 * TOUCH
        while time.monotonic() < until:
            if self._stamp() != before:
                return True
            time.sleep(1.0)
        return False

    def _stamp(self) -> int:
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _stay_alive(self) -> None:
        while not self._end.wait(TOUCH):
            # A network file system may fail for a moment; who stops here counts as dead on other machines.
            with contextlib.suppress(OSError):
                if self._holder().get("token") == self._mine["token"]:
                    os.utime(self.path)
