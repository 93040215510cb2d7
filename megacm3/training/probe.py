"""A fixed batch: logits of it are stored with a checkpoint, and compared after each load.

Hashes say that a file is what was written; this says that what was read makes the model that was saved.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from megacm3.config import Config
from megacm3.errors import CheckpointError
from megacm3.parallel.engine import Engine

LOGITS = 64
"""How many are stored: one id's at each of so many positions."""
TOLERANCE = {"fp32": 1e-4}
"""What sums in another layout's order may change, as a part of the logits' root mean square, by train.dtype; else
ROUNDED. Between tensor and pipeline parallel ranks 3e-6 and, in bf16, 1e-2 were seen with two layers; deep networks
round more often. Another model is off by about 1."""
ROUNDED = 0.25


def probe(engine: Engine, config: Config) -> list[float]:
    """Logits of random ids in a row of random ids, the same in every layout, without dropout. Collective."""
    length, size = config.model.sequence_length, config.model.vocab_size
    tokens = torch.randint(0, size, (1, length + 1), generator=torch.Generator().manual_seed(0))
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "documents": torch.zeros(1, length, dtype=torch.int32),
        "numbers": torch.zeros(1, dtype=torch.int64),
    }
    chosen = torch.linspace(0, length - 1, min(LOGITS, length)).long()
    logits: list[float] = engine.target_logits(batch)[chosen].tolist()
    return logits


def check_probe(saved: Sequence[float], found: Sequence[float], dtypes: tuple[str, str], path: Path) -> float:
    """The largest difference, as a part of the root mean square. dtypes: train.dtype at the save and now.

    Raises CheckpointError when a loaded model is not the saved one.
    """
    then, now = torch.tensor(saved, dtype=torch.float64), torch.tensor(found, dtype=torch.float64)
    difference = float((now - then).abs().max() / then.square().mean().sqrt())
    tolerance = max(TOLERANCE.get(dtype, ROUNDED) for dtype in dtypes)
    if not difference <= tolerance:
        raise CheckpointError(
            f"{path} was loaded, but the logits of its fixed batch differ by {difference:.1e} of their root mean "
            f"square from those with which it was saved, more than the {tolerance:.0e} of rounding. The files are what "
            "was written: another version of megacm3, torch or the kernels computes differently"
        )
    return difference
