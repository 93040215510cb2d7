"""The network as a list of stages; the same list for one process and for a pipeline.

Words -> Positions -> Block x layers -> [the tied table again] -> Head. What travels is a tuple: (tokens, meta) into the
table, (hidden, meta) between blocks, (hidden, meta, table) into a tied head, and the scalar loss out of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)

from megacm3.config import Config
from megacm3.model.block import Block, positions_in_document, unpack
from megacm3.model.init import initialize
from megacm3.model.kernels import PLAIN, Kernels
from megacm3.model.layers import Norm, linear_config
from megacm3.model.loss import IGNORE, POSITION_BUCKETS, LossState, chunked_loss
from megacm3.model.trained import IMAGE_ROWS, ImageRows, freeze
from megacm3.parallel import parts
from megacm3.parallel.context import ParallelContext
from megacm3.tokenizers.vocabulary import IMAGE, TEXT


def _no_init(weight: torch.Tensor) -> torch.Tensor:
    return weight


def table_rows(config: Config) -> int:
    """Rows of the embedding table."""
    return config.model.vocab_rows or config.model.vocab_size


def _table_part(name: str, config: Config, context: ParallelContext) -> list[parts.Part]:
    # Padding rows exist only in a running model: the logical table has vocab_size rows.
    size = table_rows(config) // context.tensor
    first = context.tensor_rank * size
    rows = max(0, min(config.model.vocab_size, first + size) - first)
    shape = (config.model.vocab_size, config.model.hidden_size)
    return [parts.Part(name, shape, (first, 0), (rows, shape[1]), 0)] if rows else []


def _image_rows(
    name: str, config: Config, context: ParallelContext, kinds: torch.Tensor, dtype: torch.dtype
) -> tuple[list[parts.Part], ImageRows, torch.nn.Parameter | None]:
    """The table's parts; where the rows of image ids lie, and the parameter that takes their place if they train."""
    images = ImageRows(kinds, table_rows(config) // context.tensor, context)
    pieces = _table_part(name, config, context)
    if config.train.parameters != IMAGE_ROWS:
        return pieces, images, None
    rows = images.parameter(name, (config.model.vocab_size, config.model.hidden_size), dtype)
    return [kept for piece in pieces for kept in images.outside(piece)], images, rows


class Words(torch.nn.Module):
    """Token ids -> vectors, from a table whose rows are cut over the tensor ranks. Without positions it may be tied."""

    def __init__(self, config: Config, context: ParallelContext, linear: Any, kinds: torch.Tensor) -> None:
        super().__init__()
        self.table = VocabParallelEmbedding(
            table_rows(config),
            config.model.hidden_size,
            init_method=_no_init,
            reduce_scatter_embeddings=False,
            config=linear,
            tp_group=context.tensor_group,
        )
        with torch.no_grad():
            self.table.weight.zero_()  # padding rows stay zero
        pieces, self.images, self.image_rows = _image_rows("embed.weight", config, context, kinds, linear.params_dtype)
        parts.attach(self.table.weight, pieces, split=context.tensor > 1)

    @property
    def weight(self) -> torch.Tensor:
        """The table [rows / TP, H], which a tied head shares."""
        table: torch.Tensor = self.table.weight
        return table if self.image_rows is None else self.images.table(self.image_rows, table)

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens int64 [B, T], meta) -> (vectors [B, T, H], meta)."""
        tokens_BT, meta = inputs
        x_BTH = self.table(tokens_BT)
        if self.image_rows is not None:
            x_BTH = self.images.embed(self.image_rows, tokens_BT, x_BTH)
        return x_BTH, meta


class Positions(torch.nn.Module):
    """Adds learned positions where the model has them, and takes this rank's share of the positions."""

    def __init__(self, config: Config, context: ParallelContext, linear: Any) -> None:
        super().__init__()
        model = config.model
        self.context, self.position_reset = context, config.data.position_reset
        self.weight = None
        if model.positions == "learned":
            shape = (model.sequence_length, model.hidden_size)
            self.weight = torch.nn.Parameter(torch.empty(shape, dtype=linear.params_dtype, device=context.device))
            parts.attach(self.weight, [parts.whole("positions.weight", shape)], split=False)

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(vectors [B, T, H], meta) -> (hidden [S, B, H], meta)."""
        x_BTH, meta = inputs
        if self.weight is not None and self.position_reset:
            x_BTH = x_BTH + self.weight[positions_in_document(unpack(meta)[1])]
        elif self.weight is not None:
            x_BTH = x_BTH + self.weight[: x_BTH.shape[1]]
        x_TBH = x_BTH.transpose(0, 1).contiguous()
        if self.context.sequence:
            return scatter_to_sequence_parallel_region(x_TBH, group=self.context.tensor_group), meta
        return x_TBH, meta


def hand_on_table(words: Words, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The tied table joins what travels, just before the head."""
    return (*inputs, words.weight)


class Head(torch.nn.Module):
    """Final norm, projection to the vocabulary and loss, in one, so that logits never exist whole."""

    kinds: torch.Tensor

    def __init__(
        self,
        config: Config,
        context: ParallelContext,
        linear: Any,
        kinds: torch.Tensor,
        state: LossState,
        kernels: Kernels = PLAIN,
    ) -> None:
        super().__init__()
        model = config.model
        self.context, self.state = context, state
        self.vocab_size, self.z_loss = model.vocab_size, config.objective.z_loss
        self.register_buffer("kinds", kinds.to(context.device), persistent=False)
        self.norm = Norm("final_norm", model, context, linear.params_dtype, kernels)
        self.tied_to: tuple[Words, ...] = ()
        self.weight = self.image_rows = None
        if not model.tied:
            shape = (table_rows(config) // context.tensor, model.hidden_size)
            self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=linear.params_dtype, device=context.device))
            pieces, self.images, self.image_rows = _image_rows(
                "head.weight", config, context, kinds, linear.params_dtype
            )
            parts.attach(self.weight, pieces, split=context.tensor > 1)

    def _gathered(self, x: torch.Tensor) -> torch.Tensor:
        group = self.context.tensor_group
        if self.context.sequence:
            return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
        if self.context.tensor > 1:
            return copy_to_tensor_model_parallel_region(x, group=group)
        return x

    def _table(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if self.weight is not None:
            return self.weight if self.image_rows is None else self.images.table(self.image_rows, self.weight)
        # tied: the same module without a pipeline, handed on by its stage with one
        return self.tied_to[0].weight if self.tied_to else inputs[2]

    def logits(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """(hidden [S, B, H], meta[, table]) -> logits [B, T, rows of this tensor rank]: to compare, not to train."""
        x_TBH = self._gathered(self.norm(inputs[0]))
        return (x_TBH @ self._table(inputs).T).transpose(0, 1)

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """(hidden [S, B, H], meta[, table]) -> the micro-batch's share of the step's loss."""
        x, meta = inputs[:2]
        weight = self._table(inputs)
        self.state.output_norm.append(x.detach().float().square().mean())
        x_TBH = self._gathered(self.norm(x))
        targets = unpack(meta)[2].T.reshape(-1)
        loss, nll, log_z = chunked_loss(
            x_TBH.flatten(0, 1),
            weight,
            targets,
            vocab_size=self.vocab_size,
            z_loss=self.z_loss,
            scale=self.state.scale,
            group=self.context.tensor_group,
            world=self.context.tensor,
            rank=self.context.tensor_rank,
        )
        self._count(targets, nll, log_z, x_TBH.shape[:2])
        return loss

    @torch.no_grad()
    def _count(self, targets: torch.Tensor, nll: torch.Tensor, log_z: torch.Tensor, shape: torch.Size) -> None:
        real = targets != IGNORE
        kind = self.kinds[targets.clamp(min=0)]
        text, image = real & (kind == TEXT), real & (kind == IMAGE)
        nll, log_z = nll.double(), log_z.double()
        if self.state.target_logits is not None:
            self.state.target_logits.append(log_z - nll)
        columns = [(nll, real), (log_z.square(), real), (log_z, real), (None, real)]
        columns += [(nll, text), (None, text), (nll, image), (None, image)]
        sums = torch.stack([mask.sum().double() if x is None else (x * mask).sum() for x, mask in columns])
        # Positions first in memory: a bucket is a row, and the sums are in the same order in every run.
        length, batch = shape
        width = -(-length // POSITION_BUCKETS) * batch
        rows = torch.stack((nll * real, real.double()))
        rows = F.pad(rows, (0, POSITION_BUCKETS * width - rows.shape[1]))
        sums = torch.cat((sums, rows.view(2 * POSITION_BUCKETS, width).sum(1)))
        self.state.sums = sums if self.state.sums is None else self.state.sums + sums


@dataclass(frozen=True)
class Stage:
    """One entry of the list: a module to build, or a second call of the tied table."""

    build: Callable[[], torch.nn.Module]
    is_table: bool = False
    """The table itself (first entry), shared with `tied_call`."""
    tied_call: Callable[..., Any] | None = None
    """How the table is called when the head needs it."""
    tied_weights: tuple[str, ...] = ()
    """The table's parameters, by attribute: where a pipeline holds two copies of it, they must stay equal."""
    is_block: bool = False
    """Blocks are what a pipeline spreads evenly."""


def list_stages(
    config: Config, context: ParallelContext, kinds: torch.Tensor, state: LossState, kernels: Kernels = PLAIN
) -> list[Stage]:
    """The network as a list, the same for every layout.

    kinds: uint8 [vocab_size], `Vocabulary.kind`: which targets count as text and which as image.
    """
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    linear = linear_config(config, context, dtype)
    seed = config.train.seed

    def built(module: torch.nn.Module) -> torch.nn.Module:
        initialize(module, config.model, seed)
        freeze(module, config)
        return module

    tied = ("table.weight", *([IMAGE_ROWS] if config.train.parameters == IMAGE_ROWS else []))
    stages = [
        Stage(lambda: built(Words(config, context, linear, kinds)), is_table=True, tied_weights=tied),
        Stage(lambda: built(Positions(config, context, linear))),
    ]
    stages += [
        Stage(partial(_block, built, i, config, context, linear, kernels), is_block=True)
        for i in range(config.model.layers)
    ]
    if config.model.tied:
        stages.append(Stage(stages[0].build, is_table=True, tied_call=hand_on_table, tied_weights=tied))
    stages.append(Stage(lambda: built(Head(config, context, linear, kinds, state, kernels))))
    return stages


def _block(built: Callable[..., torch.nn.Module], index: int, *rest: Any) -> torch.nn.Module:
    return built(Block(index, *rest))


class Network(torch.nn.Module):
    """All stages in one process group: what an engine without a pipeline drives."""

    def __init__(self, stages: list[Stage], built: Callable[[torch.nn.Module], None] | None = None) -> None:
        """built: called with each module right after it is built, before the next one is."""
        super().__init__()
        self.stages = torch.nn.ModuleList()
        for stage in stages:
            if stage.tied_call is None:
                module = stage.build()
                if built is not None:
                    built(module)
                self.stages.append(module)
        words, head = self.stages[0], self.stages[-1]
        assert isinstance(words, Words) and isinstance(head, Head)
        if any(stage.tied_call is not None for stage in stages):
            head.tied_to = (words,)

    def forward(self, tokens_BT: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
        """(tokens int64 [B, T], meta) -> the micro-batch's share of the step's loss."""
        x: Any = (tokens_BT, meta)
        for stage in self.stages:
            x = stage(x)
        return x  # type: ignore[no-any-return]
