"""Which parameters train (train.parameters), and the rows of image ids as a parameter of their own."""

import torch

from megacm3.config import Config
from megacm3.parallel import parts
from megacm3.parallel.context import ParallelContext
from megacm3.parallel.replicated import summed_over_tensor_ranks
from megacm3.tokenizers.vocabulary import IMAGE

IMAGE_ROWS = "image_rows"
"""Name of the parameter, in the modules that have it."""


def freeze(module: torch.nn.Module, config: Config) -> None:
    """Let only the parameters train that train.parameters chooses; the others get neither gradient nor optimizer."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(_trains(name, parameter, config.train.parameters))


def _trains(name: str, parameter: torch.nn.Parameter, choice: str) -> bool:
    if choice == "all":
        return True
    if choice == IMAGE_ROWS:
        return name.split(".")[-1] == IMAGE_ROWS
    mark = {"norms": "norm", "lora": ".lora_"}[choice]
    return any(mark in part.name for part in parts.parts_of(parameter))


def trained_boxes(module: torch.nn.Module) -> dict[str, list[parts.Part]]:
    """Logical name -> the boxes of it that train on this rank."""
    found: dict[str, list[parts.Part]] = {}
    for parameter, part in parts.named_parts(module):
        if parameter.requires_grad:
            found.setdefault(part.name, []).append(part)
    return found


class ImageRows:
    """Where the rows of image ids lie in a table that is cut over tensor ranks.

    The rows that train are one parameter [codes, H], whole on every tensor rank however they lie in the table; it
    stands in the place of the table's own rows, which nothing reads any more. Its parts are boxes of the table's
    logical tensor, so that checkpoints know no difference.
    """

    def __init__(self, kinds: torch.Tensor, rows: int, context: ParallelContext) -> None:
        """kinds: uint8 [vocab_size], `Vocabulary.kind`. rows: of the table on one rank."""
        self.ids = (kinds == IMAGE).nonzero()[:, 0].cpu()
        self.context, first = context, context.tensor_rank * rows
        place = torch.full((kinds.numel(),), -1)
        place[self.ids] = torch.arange(self.ids.numel())
        mine = (self.ids >= first) & (self.ids < first + rows)
        self._place = place.to(context.device)
        self._local = (self.ids[mine] - first).to(context.device)
        self._mine = mine.nonzero()[:, 0].to(context.device)

    def runs(self) -> list[tuple[int, int]]:
        """(first id, count) of each run of neighbouring image ids."""
        breaks = (self.ids.diff() != 1).nonzero()[:, 0] + 1
        return [(int(run[0]), run.numel()) for run in self.ids.tensor_split(breaks.tolist()) if run.numel()]

    def parameter(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.nn.Parameter:
        """The rows of the logical table `name` of `shape`, not yet filled."""
        values = torch.empty(self.ids.numel(), shape[1], dtype=dtype, device=self.context.device)
        pieces, start = [], 0
        for first, count in self.runs():
            pieces.append(parts.Part(name, shape, (first, 0), (count, shape[1]), start))
            start += count
        parameter = torch.nn.Parameter(values)
        parts.attach(parameter, pieces, split=False)
        return parameter

    def outside(self, part: parts.Part) -> list[parts.Part]:
        """A part of the table without the rows of image ids."""
        low, end = part.offset[0], part.offset[0] + part.shape[0]
        kept, begin = [], low
        for first, count in [*self.runs(), (end, 0)]:
            stop = max(begin, min(first, end))
            if stop > begin:
                shape = (stop - begin, part.shape[1])
                kept.append(parts.Part(part.name, part.global_shape, (begin, 0), shape, part.start + begin - low))
            begin = max(begin, min(first + count, end))
        return kept

    def embed(self, rows: torch.Tensor, tokens_BT: torch.Tensor, x_BTH: torch.Tensor) -> torch.Tensor:
        """The vectors with those of image ids taken from the parameter."""
        place_BT = self._place[tokens_BT]
        vectors = torch.nn.functional.embedding(place_BT.clamp(min=0), rows)
        return torch.where((place_BT >= 0)[..., None], vectors, x_BTH)

    def table(self, rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """The rank's table with the rows in their places: each rank's gradient is that of its own rows only."""
        whole = summed_over_tensor_ranks(rows, self.context)
        return table.index_copy(0, self._local, whole[self._mine])
