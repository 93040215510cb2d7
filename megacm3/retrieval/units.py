"""Long jobs as units: each makes some files of the folder-to-be, whole or not at all, in any order, on any worker.

A finished unit leaves a note below `done/` of the job's working folder (jobs.py): its files with sizes and hashes. A
unit computes with one thread in one order, so that the result is the same to the byte for any number of workers and
interruptions.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import loguru

from megacm3.command import progress
from megacm3.errors import ConfigError, DataError
from megacm3.files import read_json, sha256_file, write_json
from megacm3.retrieval.jobs import DONE, FOLDER

if TYPE_CHECKING:
    from megacm3.data.executors import ExecutorOptions

logger = logging.getLogger(__name__)
# A task of datatrove logs a dozen lines of its own; faults come back as exceptions.
loguru.logger.disable("datatrove")

LOG, SUBMITTED = "log", "submitted.json"
_POLL_SECONDS = 5.0
"""Between two looks at Slurm's queue."""


class Units(Protocol):
    """Units of one stage of a job; picklable."""

    @property
    def stage(self) -> str:
        """A word that names the stage in messages and notes."""

    @property
    def count(self) -> int:
        """Number of units."""

    def make(self, folder: Path, number: int) -> list[Path]:
        """Write the files of unit `number` below `folder` (each through `new_file`) and name them."""


def unit_done(work: Path, stage: str, number: int) -> bool:
    """Whether a unit's note is there and its files have the noted sizes."""
    note = _note(work, stage, number)
    if not note.is_file():
        return False
    sizes = [(work / FOLDER / name, entry["bytes"]) for name, entry in read_json(note).items()]
    return all(path.is_file() and path.stat().st_size == size for path, size in sizes)


def run_units(units: Units, work: Path, workers: int = 1, where: "ExecutorOptions | None" = None) -> int:
    """Make every unit that is not done yet, `workers` at a time; gives their number.

    where: on which machines (default: here); Slurm and Ray take its `workers` and not `workers`. Raises what a unit
    raises; finished units are kept.
    """
    if workers < 0:
        raise ConfigError(f"--workers {workers}; expected 0 or more")
    missing = [number for number in range(units.count) if not unit_done(work, units.stage, number)]
    if not missing:
        return 0
    if where is not None and where.executor != "local":
        _run_elsewhere(units, work, tuple(missing), where)
        return len(missing)
    workers = min(workers or len(os.sched_getaffinity(0)), len(missing))
    if workers == 1:
        shown = missing if len(missing) == 1 else progress(missing, unit="unit", description=units.stage)
        for number in shown:
            run_unit(units, work, number)
        return len(missing)
    from megacm3.data.executors import run_here

    # What datatrove notes as completed does not count here; the notes under `done/` do.
    log = work / LOG / units.stage
    shutil.rmtree(log, ignore_errors=True)
    step = DatatroveStep(units, str(work), tuple(missing))
    with _watched(units, work, len(missing)):
        run_here(step, len(missing), workers, log)
    return len(missing)


def _run_elsewhere(units: Units, work: Path, missing: tuple[int, ...], where: "ExecutorOptions") -> None:
    from megacm3.data.executors import running_job, submit

    step, log = DatatroveStep(units, str(work), missing), work / LOG
    with _watched(units, work, len(missing)):
        if where.executor == "ray":
            from datatrove.executor.ray import RayPipelineExecutor

            shutil.rmtree(log, ignore_errors=True)
            # Without a number: as many as there are.
            limit = where.workers or -1
            RayPipelineExecutor([step], tasks=len(missing), workers=limit, logging_dir=str(log)).run()
        else:
            # A job that an earlier run of this command handed in is waited for, not handed in twice.
            if running_job(work) is None:
                shutil.rmtree(log, ignore_errors=True)
                submit(step, len(missing), f"{units.stage}-{work.stem}", work, where)
                logger.info("%s: %d units handed to Slurm; logs in %s", units.stage, len(missing), log)
            while running_job(work) is not None:
                time.sleep(_POLL_SECONDS)
            (work / SUBMITTED).unlink(missing_ok=True)
    lost = [number for number in missing if not unit_done(work, units.stage, number)]
    if lost:
        raise DataError(
            f"{len(lost)} of {len(missing)} units of {units.stage} failed under {where.executor} (first: {lost[0]}); "
            f"see {log}, then run the same command again"
        )


@dataclass(frozen=True)
class DatatroveStep:
    """A step of datatrove's executors (local, Slurm, Ray): task N makes the N-th of the missing units."""

    units: Units
    work: str
    missing: tuple[int, ...]

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """Make one unit."""
        run_unit(self.units, Path(self.work), self.missing[rank])


def run_unit(units: Units, work: Path, number: int) -> None:
    """Make one unit and note it, unless it is done."""
    if unit_done(work, units.stage, number):
        return
    with one_thread():
        paths = units.make(work / FOLDER, number)
    entries = {}
    for path in paths:
        name = path.relative_to(work / FOLDER).as_posix()
        entries[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    write_json(_note(work, units.stage, number), entries)


def _note(work: Path, stage: str, number: int) -> Path:
    return work / DONE / f"{stage}-{number:05d}.json"


@contextmanager
def one_thread() -> Iterator[None]:
    """torch and faiss with one thread: sums then come out the same, however many workers share the cores."""
    import torch

    from megacm3.retrieval.index import faiss_threads

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with faiss_threads(1):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _watched(units: Units, work: Path, total: int) -> Iterator[None]:
    # A bar over the notes that the workers leave.
    done = threading.Event()
    before = len(list((work / DONE).glob(f"{units.stage}-*.json")))

    def ticks() -> Iterator[None]:
        shown = 0
        while shown < total:
            stop = done.wait(0.5)
            now = len(list((work / DONE).glob(f"{units.stage}-*.json"))) - before
            yield from [None] * max(0, now - shown)
            shown = max(shown, now)
            if stop:
                return

    bar = progress(ticks(), total=total, unit="unit", description=units.stage)
    watcher = threading.Thread(target=lambda: [None for _ in bar], daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
