"""A job that makes one folder, alone, over as many runs as it takes.

Its unfinished files lie in `OUTPUT.work/folder`, beside `plan.json` (what the job is) and the notes of finished units
under `done/` (units.py). A run that was killed continues where it stopped.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacm3.errors import DataError
from megacm3.files import MANIFEST, Manifest, fsync_tree, read_json, read_manifest, write_json, write_manifest

DONE, FOLDER = "done", "folder"
_LOCK, _PLAN = "lock", "plan.json"


@dataclass(frozen=True)
class Job:
    """A folder to be made."""

    output: Path
    kind: str
    """Kind of the manifest."""
    settings: dict[str, Any]
    """All that decides the bytes, beside the inputs."""
    inputs: dict[str, str]
    """Fingerprints by role."""

    @property
    def work(self) -> Path:
        """Where an unfinished job lies."""
        return self.output.with_name(self.output.name + ".work")

    @property
    def folder(self) -> Path:
        """What will be the output."""
        return self.work / FOLDER

    def finished(self, overwrite: bool = False) -> Manifest | None:
        """The manifest of an output that this very job has made before, None when there is none.

        Raises DataError when the output is something else, unless `overwrite` allows to replace it.
        """
        if not self.output.exists() or (self.output.is_dir() and not any(self.output.iterdir())):
            return None
        if not (self.output / MANIFEST).is_file():
            raise DataError(f"{self.output} exists and is no folder of kind '{self.kind}'; give another --output")
        manifest = read_manifest(self.output, self.kind)
        found = difference(
            {"settings": manifest.settings.get("job", {}), "inputs": manifest.inputs},
            {"settings": _plain(self.settings), "inputs": self.inputs},
        )
        if not found:
            shutil.rmtree(self.work, ignore_errors=True)
            return manifest
        if overwrite:
            return None
        raise DataError(
            f"{self.output} exists and was made with {found}; give another --output, or --overwrite to replace it"
        )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the job: two runs on one folder would remove each other's unfinished files. Ends with the process.

        Raises DataError while another process holds it.
        """
        import fcntl

        path = self.work / _LOCK
        if self.work.exists() and not self.work.is_dir():
            raise DataError(f"{self.work} is in the way; remove it")
        while True:
            self.work.mkdir(parents=True, exist_ok=True)
            with open(path, "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as fault:
                    raise DataError(f"another process is at work on {self.output}; wait for it or end it") from fault
                # The run that held it before may have finished and removed the file.
                if not path.exists() or os.fstat(lock.fileno()).st_ino != path.stat().st_ino:
                    continue
                try:
                    yield
                finally:
                    self._leave()
                return

    def _leave(self) -> None:
        # Nothing stays of a job that never began.
        if self.work.is_dir() and [path.name for path in self.work.iterdir()] == [_LOCK]:
            shutil.rmtree(self.work)

    def prepare(self, overwrite: bool = False) -> None:
        """Make the working folder, or keep what an interrupted run of the same job left in it.

        Raises DataError when it holds the work of another job, unless `overwrite` allows to discard it.
        """
        plan = {"kind": self.kind, "settings": _plain(self.settings), "inputs": self.inputs}
        if (self.work / _PLAN).is_file():
            found = difference(read_json(self.work / _PLAN), plan)
            # Where no unit was finished, nothing is lost.
            overwrite = overwrite or not any((self.work / DONE).glob("*.json"))
            if found and not overwrite:
                raise DataError(f"{self.work} holds unfinished work made with {found}; remove it, or give --overwrite")
            if found:
                for path in self.work.iterdir():
                    if path.name != _LOCK:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif self.work.is_dir() and [path for path in self.work.rglob("*") if path.is_file() and path.name != _LOCK]:
            raise DataError(f"{self.work} is in the way and holds no unfinished work (no {_PLAN}); remove it")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.work / _PLAN, plan)
        (self.work / DONE).mkdir(exist_ok=True)
        self._clear_unfinished()

    def _clear_unfinished(self) -> None:
        for leftover in list(self.folder.rglob(".*.tmp")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)

    def commit(self, settings: dict[str, Any], overwrite: bool = False) -> Manifest:
        """Put the working folder under its final name with a manifest of `settings` and the job's own."""
        # A worker that was killed and whose unit another has made since, as Slurm does, leaves a half-written file.
        self._clear_unfinished()
        known: dict[str, dict[str, Any]] = {}
        for note in sorted((self.work / DONE).glob("*.json")):
            known |= read_json(note)
        manifest = write_manifest(self.folder, self.kind, settings | {"job": self.settings}, self.inputs, known)
        fsync_tree(self.folder)
        if self.output.exists() and (overwrite or not any(self.output.iterdir())):
            shutil.rmtree(self.output)
        os.rename(self.folder, self.output)
        shutil.rmtree(self.work)
        return manifest


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """How two plans differ, in words; empty when they do not."""
    for name in sorted({*old["inputs"], *new["inputs"]}):
        was, now = str(old["inputs"].get(name))[:12], str(new["inputs"].get(name))[:12]
        if was != now:
            return f"another {name} ({was} then, {now} now)"
    for name in sorted({*old["settings"], *new["settings"]}):
        was, now = old["settings"].get(name), new["settings"].get(name)
        if was != now:
            return f"{name} = {was} then, {now} now"
    return ""


def _plain(value: Any) -> Any:
    # As JSON gives it back: tuples are lists.
    return json.loads(json.dumps(value))
