"""What a checkpoint is made of, and what its manifest says of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from megacm3.checkpoint.boxes import Box, whole
from megacm3.checkpoint.tensors import CODES
from megacm3.errors import CheckpointError

PARAM, MASTER = "param", "master"


@dataclass(frozen=True)
class Piece:
    """A box of a logical tensor, with its values."""

    kind: str
    """param, master (fp32 copy of a bf16 parameter), or the optimizer's name for a moment: exp_avg, exp_avg_sq."""
    name: str
    global_shape: tuple[int, ...]
    box: Box
    tensor: torch.Tensor
    """Of the box's shape; a view of the engine's memory."""


def index_of(pieces: list[Piece], step: int, trained: dict[str, list[str]] | None = None) -> dict[str, Any]:
    """What a rank's file holds: kinds with dtypes, tensors with shapes, boxes by kind and tensor.

    trained: boxes by tensor of the parameters that the rank trains; None = all that it holds.
    """
    boxes: dict[str, dict[str, list[str]]] = {}
    for piece in pieces:
        boxes.setdefault(piece.kind, {}).setdefault(piece.name, []).append(str(piece.box))
    return {
        "optimizer_step": step,
        "kinds": {piece.kind: CODES[piece.tensor.dtype] for piece in pieces},
        "tensors": {piece.name: list(piece.global_shape) for piece in pieces},
        "boxes": boxes,
        "trained": trained,
    }


def trained_numel(trained: dict[str, list[str]] | None, name: str, shape: tuple[int, ...]) -> int:
    """Elements of a tensor that train, and have masters and moments."""
    if trained is None:
        return whole(shape).numel
    return sum(Box.parse(text).numel for text in trained.get(name, ()))


def joined_boxes(ranks: Iterable[dict[str, list[str]]]) -> dict[str, list[str]]:
    """The boxes by tensor of all ranks, those of copies once."""
    found: dict[str, set[str]] = {}
    for boxes in ranks:
        for name, texts in boxes.items():
            found.setdefault(name, set()).update(texts)
    return {name: sorted(texts) for name, texts in sorted(found.items())}


def manifest_settings(
    *,
    step: int,
    optimizer_step: int,
    layout: dict[str, Any],
    config: dict[str, Any],
    state: dict[str, Any],
    parts: list[dict[str, Any]],
) -> dict[str, Any]:
    """The `settings` of a checkpoint's manifest. parts: {"file", "kinds", "tensors", "boxes", "trained"} of each file.

    Raises CheckpointError when the files together do not cover every tensor exactly once: parameters wholly, other
    kinds where they train.
    """
    kinds = {kind: code for part in parts for kind, code in part["kinds"].items()}
    tensors = {name: shape for part in parts for name, shape in part["tensors"].items()}
    found = dict.fromkeys(((kind, name) for kind in kinds for name in tensors), 0)
    for part in parts:
        for kind, names in part["boxes"].items():
            for name, boxes in names.items():
                found[kind, name] += sum(Box.parse(text).numel for text in boxes)
    given = [part["trained"] for part in parts if part["trained"] is not None]
    trained = joined_boxes(given) if given else None
    for (kind, name), count in found.items():
        if count != trained_numel(None if kind == PARAM else trained, name, tuple(tensors[name])):
            raise CheckpointError(f"{kind} of {name}: {count} elements were written; expected a tensor {tensors[name]}")
    return {
        "step": step,
        "optimizer_step": optimizer_step,
        "layout": layout,
        "kinds": kinds,
        "tensors": dict(sorted(tensors.items())),
        "boxes": {part["file"]: part["boxes"] for part in parts},
        "config": config,
        "state": state,
    } | ({"trained": trained} if trained is not None else {})
