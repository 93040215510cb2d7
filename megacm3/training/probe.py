"""A fixed batch: what its logits come to is stored with a checkpoint, and compared after each load.

Hashes say that a file is what was written; this says that what was read makes the model that was saved.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from megacm3.config import Config
from megacm3.errors import CheckpointError
from megacm3.parallel.engine import Engine

FIGURES = ("loss", "log_z", "log_z_square")
"""Means over the batch: -log p of the targets, log of the softmax's denominator over all ids, its square."""
TOLERANCE = {"fp32": 1e-5}
"""Relative, by train.dtype: what sums in another layout's order may change. Else ROUNDED."""
ROUNDED = 1e-3


def probe(engine: Engine, config: Config) -> dict[str, float]:
    """FIGURES of one row of random ids, the same in every layout, without dropout. Collective."""
    length, size = config.model.sequence_length, config.model.vocab_size
    tokens = torch.randint(0, size, (1, length + 1), generator=torch.Generator().manual_seed(0))
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "documents": torch.zeros(1, length, dtype=torch.int32),
        "numbers": torch.zeros(1, dtype=torch.int64),
    }
    nll, square, log_z, count = engine.evaluate([batch])[:4].tolist()
    return {"loss": nll / count, "log_z": log_z / count, "log_z_square": square / count}


def check_probe(saved: Mapping[str, float], found: Mapping[str, float], dtypes: tuple[str, str], path: Path) -> None:
    """Raise CheckpointError when a loaded model is not the saved one. dtypes: train.dtype at the save and now."""
    tolerance = max(TOLERANCE.get(dtype, ROUNDED) for dtype in dtypes)
    for name in FIGURES:
        then, now = saved[name], found[name]
        if not abs(then - now) <= tolerance * abs(then):
            raise CheckpointError(
                f"{path} was loaded, but {name} of its fixed batch is {now:.6f}; when it was saved it was {then:.6f}. "
                "The files are what was written: another version of megacm3, torch or the kernels computes differently"
            )
