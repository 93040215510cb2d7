"""Comparing configs: of the ranks with one another at the start, and of a run with the checkpoint that it continues."""

import dataclasses
import hashlib
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from megacm3.config import Config
from megacm3.errors import CheckpointError, ConfigError
from megacm3.files import sha256_json
from megacm3.parallel.context import ParallelContext

LIBRARIES = ("torch", "megatron-core", "deepspeed", "numpy", "safetensors", "sentencepiece", "diffusers")
FREE = (
    "parallel",
    "deepspeed",
    "checkpoint",
    "evaluation",
    "guards",
    "watchdog",
    "log",
    "train.stop_at",
    "train.micro_batch",
    "train.device",
    "train.out",
    "data.workers",
    "data.text_tokenizer",
    "data.image_tokenizer",
    "data.mixture.store",
    "data.mixture.neighbours",
    "model.preset",
    "model.vocab_rows",
)
"""What a resumed run may change without a word: it decides neither the network nor what is learnt, or is a place whose
content is compared by fingerprint."""
NAMED = (
    "optimizer.lr",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.clip",
    "optimizer.schedule",
    "train.steps",
    "train.tokens",
    "train.global_batch",
    "train.dtype",
    "train.seed",
    "model.dropout",
    "objective.z_loss",
    "objective.spans",
    "objective.whole_segment",
    "retrieval",
    "data.mixture",
    "data.stages",
    "data.upsample",
    "data.downsample",
    "data.rotation",
)
"""What it may change where checkpoint.override names it."""
STREAM = {
    "data.mixture.weight": ("stages",),
    "data.mixture.store": ("stages", "stores"),
    "data.stages": ("stages",),
    "data.upsample": ("stages",),
    "data.downsample": ("stages",),
    "data.rotation": ("settings", "stages"),
    "objective": ("settings", "stages"),
    "retrieval": ("settings", "stages"),
}
"""Which entries of a stream's description such a key decides; the others must stay, whatever is named."""


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    from megacm3 import __version__

    found = {"megacm3": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _code() -> str:
    """sha256 over the package's own files."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """("data.mixture.0.weight", value) of every leaf."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if not items and path:
        yield path, tree
    for key, value in items:
        yield from flat(value, f"{path}.{key}" if path else str(key))


def check_ranks_agree(config: Config, context: ParallelContext) -> None:
    """Raise ConfigError, on every rank, naming keys, versions or code that differ between the ranks. Collective."""
    mine = dict(flat(dataclasses.asdict(config)))
    mine |= {f"version of {name}": text for name, text in versions().items()}
    mine |= {"version of python": platform.python_version(), "code of megacm3": _code()}
    digests: list[Any] = [None] * context.world
    dist.all_gather_object(digests, sha256_json(mine), group=context.control_group)
    if len(set(digests)) == 1:
        return
    every: list[Any] = [None] * context.world
    dist.all_gather_object(every, mine, group=context.control_group)
    told = []
    for key in sorted({key for one in every for key in one}):
        by_value: dict[str, list[int]] = {}
        for rank, one in enumerate(every):
            by_value.setdefault(repr(one.get(key)), []).append(rank)
        if len(by_value) > 1:
            values = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in by_value.items())
            told.append(f"{key} = {values}")
    raise ConfigError(f"the ranks were started differently: {'; '.join(told[:6])}; expected the same on all")


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _under(key: str, prefixes: tuple[str, ...] | list[str]) -> bool:
    # Places in lists are no part of a key's name: data.mixture.0.weight is under data.mixture.
    name = ".".join(part for part in key.split(".") if not part.isdigit())
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


class Change(NamedTuple):
    """A config key with another value than the checkpoint's."""

    key: str
    was: Any
    now: Any


def changed_keys(saved: dict[str, Any], config: Config) -> list[Change]:
    """What differs from a checkpoint's config and is allowed to.

    Raises CheckpointError listing the keys that may not differ, or only by name.
    """
    before, now = dict(flat(saved)), dict(flat(dataclasses.asdict(config)))
    sections = {key.split(".")[0] for key in before}
    differing = [
        Change(key, before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _under(key, FREE) and key.split(".")[0] in sections
    ]
    named = [change for change in differing if _under(change.key, NAMED)]
    unnamed = [change for change in named if not _under(change.key, config.checkpoint.override)]
    structural = [change for change in differing if change not in named]
    for changes, way in (
        (structural, "set them back, or start a new run in another train.out"),
        (unnamed, "set them back, or name them in checkpoint.override"),
    ):
        if changes:
            told = "; ".join(f"{c.key} was {c.was}, is now {c.now}" for c in changes[:8])
            raise CheckpointError(f"the config differs from the checkpoint's: {told}; {way}")
    return named


def free_parts(override: list[str]) -> set[str]:
    """The entries of a stream's description that may differ from the checkpoint's."""
    keys = [key for key in STREAM for name in override if _under(key, [name]) or _under(name, [key])]
    return {part for key in keys for part in STREAM[key]}


def check_override(config: Config) -> None:
    """Raise ConfigError for a name in checkpoint.override that can never be overridden."""
    for name in config.checkpoint.override:
        if not any(_under(name, [allowed]) or _under(allowed, [name]) for allowed in NAMED):
            raise ConfigError(f"checkpoint.override: {name} cannot change in a run; possible: {', '.join(NAMED)}")
