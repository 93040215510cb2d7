"""Which boxes of which logical tensors a local parameter holds.

Logical tensors are whole, unfused and layout-free (`layers.0.attn.q.weight`); a running model fuses q, k, v and gate,
up and cuts them over tensor ranks. Initialisation, checkpoints, conversion and the tests work on logical tensors only.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Part:
    """Rows [start, start + shape[0]) of a local tensor are the box [offset, offset + shape) of the tensor `name`."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int

    @property
    def whole(self) -> bool:
        """Whether the box is the whole logical tensor."""
        return self.shape == self.global_shape


def rows(name: str, global_shape: tuple[int, ...], rank: int, world: int, start: int = 0) -> Part:
    """The rank's share of a tensor cut along its first dimension."""
    size = global_shape[0] // world
    offset = (rank * size, *(0 for _ in global_shape[1:]))
    return Part(name, global_shape, offset, (size, *global_shape[1:]), start)


def columns(name: str, global_shape: tuple[int, int], rank: int, world: int) -> Part:
    """The rank's share of a matrix cut along its second dimension."""
    size = global_shape[1] // world
    return Part(name, global_shape, (0, rank * size), (global_shape[0], size), 0)


def whole(name: str, global_shape: tuple[int, ...]) -> Part:
    """A tensor that every tensor rank holds in full."""
    return Part(name, global_shape, (0,) * len(global_shape), global_shape, 0)


def attach(parameter: torch.nn.Parameter, parts: list[Part], *, split: bool) -> None:
    """Mark a parameter with its parts; `split` says that the tensor ranks hold different boxes.

    `tensor_model_parallel` is the mark by which DeepSpeed counts a parameter once per rank (split) or once in all
    (replicated) in the gradient norm.
    """
    parameter.parts = tuple(parts)  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = split  # type: ignore[attr-defined]


def parts_of(parameter: torch.Tensor) -> tuple[Part, ...]:
    """The parts of a parameter of ours."""
    return parameter.parts  # type: ignore[attr-defined,no-any-return]


def named_parts(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Parameter, Part]]:
    """Every (parameter, part) of a module, each parameter once."""
    for parameter in module.parameters():
        for part in parts_of(parameter):
            yield parameter, part
