"""Which committed step a start goes on from: never one that was not asked for, never nothing in silence."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megacm3.checkpoint.commit import clear_leftovers, discover, step_name
from megacm3.checkpoint.reader import Checkpoint
from megacm3.config import CheckpointConfig
from megacm3.errors import CheckpointError
from megacm3.parallel.context import ParallelContext

log = logging.getLogger(__name__)


def choose_step(folder: Path, settings: CheckpointConfig) -> Path | None:
    """The step below `folder` to go on from, None to begin anew. Called on one rank; clears what dead saves left.

    Raises CheckpointError when one is required and there is none, or when checkpoint.step is not valid.
    """
    clear_leftovers(folder)
    found = discover(folder)
    if settings.resume == "never":
        for path in found:
            _set_aside(path, "beginning anew (checkpoint.resume = never)")
        return None
    if settings.step:
        return _go_back(folder, found, settings.step)
    if not found and settings.resume == "required":
        raise CheckpointError(
            f"checkpoint.resume = required, but {folder} holds no valid checkpoint; "
            "set checkpoint.resume=auto to start from the beginning"
        )
    return found[0] if found else None


def _go_back(folder: Path, found: list[Path], step: int) -> Path:
    wanted = folder / step_name(step)
    later = [path for path in found if int(path.name[5:]) > step]
    if later and Checkpoint(later[0]).state.get("went_back") == step:
        log.info("checkpoint.step = %d: the run went back there before, and goes on from %s", step, later[0])
        return later[0]
    if wanted not in found:
        valid = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(f"checkpoint.step = {step}, but {wanted} is not a valid checkpoint; valid ones: {valid}")
    for path in later:
        _set_aside(path, f"going back to step {step} (checkpoint.step)")
    return wanted


def _set_aside(path: Path, why: str) -> None:
    """Rename a step: it must not be taken for one of the steps that come now."""
    aside, number = path.with_name(f"{path.name}.aside"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.aside{number}")
    os.replace(path, aside)
    log.warning("%s is set aside as %s: %s", path, aside.name, why)


def on_main(context: ParallelContext, choose: Callable[[], Path | None]) -> Path | None:
    """What `choose` says on rank 0, its CheckpointError included, on every rank: file systems may lag. Collective."""
    answer: list[Any] = [None, ""]
    if context.rank == 0:
        try:
            answer[0] = choose()
        except (CheckpointError, OSError) as fault:
            answer[1] = str(fault)
    dist.broadcast_object_list(answer, src=0, group=context.control_group)
    if answer[1]:
        raise CheckpointError(answer[1])
    path: Path | None = answer[0]
    return path
