"""Checkpoints made by one process, tensor by tensor: another layout of an existing one, or an import.

Memory is bounded by one chunk: a box of the output is read in slices of whole rows and written at once.
"""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megacm3.checkpoint.boxes import Box, row_width, whole
from megacm3.checkpoint.commit import discover
from megacm3.checkpoint.pieces import PARAM, Piece, index_of, manifest_settings
from megacm3.checkpoint.reader import KIND, Checkpoint, key_of
from megacm3.checkpoint.tensors import Entry, in_file_order, write_tensors
from megacm3.config import Config
from megacm3.errors import CheckpointError
from megacm3.files import MANIFEST, new_folder, write_manifest
from megacm3.resolve import merge
from megacm3.rules import check

log = logging.getLogger(__name__)

CHUNK = 1 << 26
"""Bytes read at once."""

Read = Callable[[str, str, Box, torch.Tensor], None]
"""(kind, name, box, out): copies a box of a logical tensor into `out`."""


def find_step(folder: str | Path) -> Path:
    """The step folder meant by a step's folder, a `checkpoints` folder or a run's folder: the newest valid one.

    Raises CheckpointError when there is none.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return folder
    steps = discover(folder / "checkpoints") or discover(folder)
    if not steps:
        found = "holds no valid checkpoint step" if folder.is_dir() else "does not exist"
        raise CheckpointError(f"{folder} {found}; give a run's folder, its checkpoints folder or one step_NNNNNN")
    return steps[0]


def config_of(tree: dict[str, Any], tensor: int, pipeline: int) -> Config:
    """The config saved with a checkpoint, at another layout. Raises ConfigError when the model cannot be cut so."""
    layout = {"parallel.tensor": tensor, "parallel.pipeline": pipeline, "parallel.sequence": False}
    config: Config = merge(Config, [("the checkpoint's config", tree), ("--tensor and --pipeline", layout)])
    rows = config.model.vocab_rows or config.model.vocab_size
    padded = dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_rows=-(-rows // tensor) * tensor)
    )
    check(padded)
    return config


def split_axis(name: str) -> int | None:
    """Along which dimension tensor ranks cut a logical tensor; None = the first one holds it whole."""
    if name.endswith(tuple(f".{kind}.{end}" for kind in ("attn.o", "mlp.down") for end in ("weight", "lora_a"))):
        return 1
    kinds = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")
    cut = tuple(f".{kind}.{end}" for kind in kinds for end in ("weight", "lora_b"))
    return 0 if name.endswith(cut) or name in ("embed.weight", "head.weight") else None


def _stage(name: str, layers: int, pipeline: int) -> int:
    if name.startswith("layers."):
        return int(name.split(".")[1]) // (layers // pipeline)
    return 0 if name in ("embed.weight", "positions.weight") else pipeline - 1


def plan(shapes: dict[str, tuple[int, ...]], layers: int, tensor: int, pipeline: int) -> list[list[tuple[str, Box]]]:
    """The (tensor, box) pairs of each rank's file at a layout without data parallel ranks, tensor rank fastest."""
    ranks: list[list[tuple[str, Box]]] = [[] for _ in range(tensor * pipeline)]
    for name, shape in shapes.items():
        first, axis = _stage(name, layers, pipeline) * tensor, split_axis(name)
        if axis is None:
            ranks[first].append((name, whole(shape)))
            continue
        size = -(-shape[axis] // tensor)
        for rank in range(tensor):
            low, high = rank * size, min((rank + 1) * size, shape[axis])
            if low < high:
                offset = tuple(low if dim == axis else 0 for dim in range(len(shape)))
                extent = tuple(high - low if dim == axis else n for dim, n in enumerate(shape))
                ranks[first + rank].append((name, Box(offset, extent)))
    return ranks


def _shared(box: Box, others: list[str]) -> list[Box]:
    found = (box.intersection(Box.parse(text)) for text in others)
    return [shared for shared in found if shared is not None]


def row_chunks(box: Box, dtype: torch.dtype) -> Iterator[Box]:
    """A box in slices of whole rows of at most about `CHUNK` bytes."""
    rows = max(1, CHUNK // (row_width(box.shape) * dtype.itemsize))
    for low in range(0, box.shape[0], rows):
        size = min(rows, box.shape[0] - low)
        yield Box((box.offset[0] + low, *box.offset[1:]), (size, *box.shape[1:]))


def write_checkpoint(
    output: str | Path,
    *,
    kinds: dict[str, torch.dtype],
    shapes: dict[str, tuple[int, ...]],
    read: Read,
    config: Config,
    step: int,
    optimizer_step: int,
    state: dict[str, Any],
    inputs: dict[str, str],
    trained: dict[str, list[str]] | None = None,
    extra: Callable[[Path], dict[str, dict[str, Any]]] = lambda folder: {},
    gate: Callable[[Path], object] = lambda folder: None,
    done: Callable[[int], None] = lambda count: None,
) -> Path:
    """Write a step's folder at the layout of `config`, whole or not at all. Raises DataError when it exists already.

    trained: boxes by tensor that masters and moments exist of; None = all. extra: writes further files into the folder
    and returns their manifest entries. gate: sees the finished folder under a temporary name, and may refuse it by
    raising. done: told of bytes written.
    """
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    with new_folder(output) as temporary:
        files, parts = extra(temporary), []
        for rank, boxes in enumerate(plan(shapes, config.model.layers, tensor, pipeline)):
            name = f"rank_{rank:05d}.safetensors"
            # Empty tensors carry shape and dtype only; values are read as they are written.
            pieces = [
                Piece(kind, tensor_name, shapes[tensor_name], held, torch.empty(held.shape, dtype=dtype, device="meta"))
                for kind, dtype in kinds.items()
                for tensor_name, box in boxes
                for held in ([box] if kind == PARAM or trained is None else _shared(box, trained.get(tensor_name, [])))
            ]
            files[name] = _write_file(temporary / name, pieces, step, read, done)
            parts.append({"file": name, **index_of(pieces, optimizer_step, trained)})
        layout = {"world": tensor * pipeline, "tensor": tensor, "data": 1, "pipeline": pipeline, "zero": 0}
        settings = manifest_settings(
            step=step,
            optimizer_step=optimizer_step,
            layout=layout,
            config=dataclasses.asdict(config),
            state=state,
            parts=parts,
        )
        write_manifest(temporary, KIND, settings, inputs, files)
        gate(temporary)
    return Path(output)


def _write_file(path: Path, pieces: list[Piece], step: int, read: Read, done: Callable[[int], None]) -> dict[str, Any]:
    by_key = {key_of(piece.kind, piece.name, piece.box): piece for piece in pieces}
    entries = in_file_order(Entry(key, piece.tensor.dtype, piece.box.shape) for key, piece in by_key.items())

    def values(entry: Entry) -> Iterator[torch.Tensor]:
        piece = by_key[entry.key]
        for box in row_chunks(piece.box, entry.dtype):
            out = torch.empty(box.shape, dtype=entry.dtype)
            read(piece.kind, piece.name, box, out)
            yield out

    return write_tensors(path, entries, {"format": "pt", "step": str(step)}, values, done)


def _carry(source: Checkpoint, folder: Path) -> dict[str, dict[str, Any]]:
    """Files of an import that are no rank's: they go along as they are. Returns their manifest entries."""
    ranks = source.manifest.settings["boxes"]
    others = {name: entry for name, entry in source.manifest.files.items() if name not in ranks}
    for name in others:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.folder / name, folder / name)
    return others


def reshard(
    checkpoint: str | Path,
    output: str | Path,
    tensor: int,
    pipeline: int,
    done: Callable[[int], None] = lambda count: None,
) -> Path:
    """Copy a checkpoint into the layout tensor x pipeline: bitwise the same logical tensors, optimizer included.

    Every file of the source is hashed meanwhile. Raises CheckpointError for a damaged source, ConfigError when the
    model cannot be cut so, DataError when the output exists.
    """
    source = Checkpoint(find_step(checkpoint))
    config = config_of(source.config, tensor, pipeline)
    source.check_coverage()
    with source.hashed_meanwhile() as verdict:
        return write_checkpoint(
            output,
            kinds=source.kinds,
            shapes=source.shapes,
            read=source.read,
            config=config,
            step=source.step,
            optimizer_step=source.optimizer_step,
            state=source.state,
            inputs={"checkpoint": source.manifest.fingerprint},
            trained=source.trained,
            extra=lambda folder: _carry(source, folder),
            gate=lambda folder: verdict(),
            done=done,
        )
