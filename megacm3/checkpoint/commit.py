"""Step folders that are whole or absent: temporary folder, manifest last, rename, then the pointer.

Below `checkpoints/`: step_000200/ is committed (manifest.json is there, every file has the size that it names);
.step_000400.tmp/ is being written, or was left by a save that died; `latest` names the newest step and is only a hint.
"""

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from megacm3.checkpoint.reader import KIND
from megacm3.errors import CheckpointError
from megacm3.faults import strike
from megacm3.files import new_file, read_manifest, write_manifest

log = logging.getLogger(__name__)
LATEST = "latest"
_STEP = re.compile(r"step_(\d{6,})")
_LEFTOVER = re.compile(r"\.step_\d{6,}\.(tmp|old|gone)")
SPARE_BYTES = 1 << 26
"""Free space that must remain after a save."""


def step_name(step: int) -> str:
    """Name of a step's folder."""
    return f"step_{step:06d}"


def temporary_folder(folder: Path, step: int) -> Path:
    """Where a step is written before it is committed; the same path on every rank."""
    return folder / f".{step_name(step)}.tmp"


def discover(folder: str | Path) -> list[Path]:
    """Committed steps below `folder`, newest first: those with a sound manifest and files of the right sizes.

    Steps that are not valid are named in a warning and left out. An empty or missing folder has none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return []
    steps = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))]
    valid = []
    for _, path in sorted(steps, reverse=True):
        try:
            read_manifest(path, KIND, error=CheckpointError)
            valid.append(path)
        except CheckpointError as fault:
            log.warning("checkpoint left out: %s", fault)
    return valid


def leftovers(folder: str | Path) -> list[Path]:
    """What dead saves left below `folder`."""
    folder = Path(folder)
    return sorted(path for path in folder.glob(".step_*") if _LEFTOVER.fullmatch(path.name))


def clear_leftovers(folder: str | Path) -> None:
    """Remove and report what dead saves left. Only the run that owns the folder may call it."""
    folder = Path(folder)
    for path in leftovers(folder):
        final = folder / path.name.split(".")[1]
        if path.suffix == ".old" and not final.exists():
            os.replace(path, final)  # it died between the two renames of a step written anew
            log.warning("%s was put back: a save that would replace it did not finish", final)
            continue
        shutil.rmtree(path)
        log.warning("removed %s, left by a save that did not finish", path)


def check_space(folder: Path, needed: int) -> None:
    """Raise CheckpointError when the disk below `folder` lacks room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise CheckpointError(
            f"a checkpoint of {needed / 1e9:.3f} GB does not fit in {folder}: {free / 1e9:.3f} GB are free; "
            "free space, lower checkpoint.keep, or move train.out"
        )


def begin(folder: Path, step: int, needed: int) -> Path:
    """Check the space and make the empty temporary folder of a step. Called on one rank."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder)
        check_space(folder, needed)
        temporary = temporary_folder(folder, step)
        temporary.mkdir()
    except OSError as fault:
        raise CheckpointError(f"{folder} cannot be written: {fault.strerror}; give another train.out") from fault
    return temporary


def commit(
    folder: Path,
    step: int,
    settings: dict[str, Any],
    inputs: dict[str, str],
    files: dict[str, dict[str, Any]],
    keep: int,
) -> list[Path]:
    """Turn a temporary folder whose files are all written into the committed step. Called on one rank.

    keep: newest valid steps to keep, 0 = all. Returns what `remove_retired` may delete. Raises CheckpointError when a
    file is not there as it was written.
    """
    temporary, final = temporary_folder(folder, step), folder / step_name(step)
    _check_there(temporary, files)
    write_manifest(temporary, KIND, settings, inputs, files)
    _fsync_folder(temporary)
    strike("save.before_rename", step=step)
    old = folder / f".{step_name(step)}.old"
    if final.exists():
        os.replace(final, old)
    os.replace(temporary, final)
    _fsync_folder(folder)
    try:
        strike("save.before_pointer", step=step)
        with new_file(folder / LATEST) as pointer:
            pointer.write_text(final.name + "\n", encoding="utf-8")
    except OSError as fault:  # the step is committed, and nothing relies on the pointer
        log.warning("%s is committed, but %s could not be written: %s", final, folder / LATEST, fault.strerror)
    retired = [old] if old.exists() else []
    for path in [path for path in discover(folder) if path != final][keep - 1 :] if keep else []:
        gone = path.with_name(f".{path.name}.gone")
        try:
            # Out of sight first: a half-deleted step must not stand under a step's name.
            os.replace(path, gone)
            retired.append(gone)
        except OSError as fault:
            log.warning("old checkpoint %s could not be removed: %s", path, fault.strerror)
    return retired


def _check_there(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            found = f"has {path.stat().st_size}" if path.is_file() else "is gone"
            raise CheckpointError(
                f"{path} was written with {entry['bytes']} bytes, but {found} where the step is committed (all ranks "
                "need the same train.out); nothing of this step is left, earlier ones are whole"
            )


def remove_retired(paths: list[Path]) -> None:
    """Delete what `commit` put out of sight; it may take its time."""
    for path in paths:
        try:
            shutil.rmtree(path)
        except OSError as fault:
            log.warning("old checkpoint %s could not be removed: %s", path, fault.strerror)


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def abandon(folder: Path, step: int) -> None:
    """Remove a step's temporary folder after a failed save."""
    shutil.rmtree(temporary_folder(folder, step), ignore_errors=True)
