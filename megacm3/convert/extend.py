"""A source with more ids than it has: rows for them are added to its embedding and head."""

from functools import cached_property

import torch

from megacm3.checkpoint.boxes import Box, whole
from megacm3.checkpoint.reshard import row_chunks
from megacm3.command import seed_from
from megacm3.convert.folder import Source
from megacm3.errors import ConfigError

NOISE = 0.02
"""Spread of new rows around the mean row, as a share of the old rows' own spread in each dimension."""
_TABLES = ("embed_tokens.weight", "lm_head.weight")


class Extended(Source):
    """`source` with `count` further ids at the end.

    A new row is the mean of the old ones with a little noise: its logit is an average one, so that the new ids neither
    dominate nor vanish, and no two are equal. (Fresh rows of the usual size would take probability from all others.)
    Raises ConfigError for a count below 1.
    """

    def __init__(self, source: Source, count: int) -> None:
        if count < 1:
            raise ConfigError(f"--extend-vocab {count}; expected the number of ids to add, at least 1")
        self.source, self.folder = source, source.folder
        self.before = source.config["vocab_size"]
        """Ids of the source."""
        self.config = source.config | {"vocab_size": self.before + count}
        self.tensors, self.tokenizers = dict(source.tensors), source.tokenizers
        for name, (file, dtype, shape) in source.tensors.items():
            if self._is_table(name):
                self.tensors[name] = (file, dtype, (self.before + count, *shape[1:]))

    def _is_table(self, name: str) -> bool:
        return name.endswith(_TABLES) and self.source.tensors[name][2][0] == self.before

    @cached_property
    def _statistics(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Mean and standard deviation of each table's rows, fp64 [H]."""
        found = {}
        for name, (_, dtype, shape) in self.source.tensors.items():
            if not self._is_table(name):
                continue
            total, squares = torch.zeros(2, shape[1], dtype=torch.float64)
            for chunk in row_chunks(whole(shape), dtype):
                rows = torch.empty(chunk.shape, dtype=dtype)
                self.source.read(name, chunk, rows)
                total += rows.sum(0, dtype=torch.float64)
                squares += rows.float().square().sum(0, dtype=torch.float64)
            mean = total / shape[0]
            found[name] = (mean, (squares / shape[0] - mean.square()).clamp(min=0).sqrt())
        return found

    def _new_row(self, name: str, row: int) -> torch.Tensor:
        mean, spread = self._statistics[name]
        generator = torch.Generator().manual_seed(seed_from("extend", name, row))
        return mean + NOISE * spread * torch.randn(len(mean), generator=generator, dtype=torch.float64)

    def read(self, name: str, box: Box, out: torch.Tensor) -> None:
        """As in `Source`."""
        if not self._is_table(name):
            self.source.read(name, box, out)
            return
        first, last = box.offset[0], box.offset[0] + box.shape[0]
        old = max(0, min(last, self.before) - first)
        if old:
            self.source.read(name, Box(box.offset, (old, *box.shape[1:])), out[:old])
        columns = slice(box.offset[1], box.offset[1] + box.shape[1])
        for row in range(first + old, last):
            out[row - first] = self._new_row(name, row)[columns].to(out.dtype)

    def tensor(self, name: str) -> torch.Tensor:
        """As in `Source`."""
        if not self._is_table(name):
            return self.source.tensor(name)
        _, dtype, shape = self.tensors[name]
        out = torch.empty(shape, dtype=dtype)
        self.read(name, whole(shape), out)
        return out
