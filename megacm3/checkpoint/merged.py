"""A checkpoint whose low-rank adapters are read as a part of the matrices that they adapt."""

from pathlib import Path

import torch

from megacm3.checkpoint.boxes import Box
from megacm3.checkpoint.pieces import MASTER, PARAM
from megacm3.checkpoint.reader import Checkpoint

A, B = "lora_a", "lora_b"


def is_adapter(name: str) -> bool:
    """Whether a logical tensor is a factor of an adapter."""
    return name.endswith((A, B))


class Merged(Checkpoint):
    """W + alpha / rank * B A in place of W, computed in fp32; the adapters themselves are no longer listed."""

    def __init__(self, folder: str | Path, *, verify: str = "size") -> None:
        super().__init__(folder, verify=verify)
        self.check_coverage()
        lora = self.config.get("lora", {})
        self._scale = lora["alpha"] / lora["rank"] if lora else 0.0
        self._factors = {name: shape for name, shape in self.shapes.items() if is_adapter(name)}
        self.shapes = {name: shape for name, shape in self.shapes.items() if name not in self._factors}

    def read(self, kind: str, name: str, box: Box, out: torch.Tensor) -> None:
        """As in `Checkpoint`, merged."""
        stem = name.removesuffix("weight")
        if kind not in (PARAM, MASTER) or stem + A not in self._factors:
            super().read(kind, name, box, out)
            return
        rank = self._factors[stem + A][0]
        best = MASTER if MASTER in self.kinds else PARAM
        a, b = torch.empty(rank, box.shape[1]), torch.empty(box.shape[0], rank)
        super().read(best, stem + A, Box((0, box.offset[1]), (rank, box.shape[1])), a)
        super().read(best, stem + B, Box((box.offset[0], 0), (box.shape[0], rank)), b)
        merged = torch.empty(box.shape)
        super().read(kind, name, box, merged)
        out.copy_(merged.addmm_(b, a, alpha=self._scale))


def open_merged(folder: str | Path) -> Checkpoint:
    """A committed step as a model without adapters."""
    plain = Checkpoint(folder)
    return Merged(folder) if any(is_adapter(name) for name in plain.shapes) else plain
