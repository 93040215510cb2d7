"""Low-rank adapters (Hu et al. 2021) of the parallel linear layers: W x + alpha / rank * B (A x), W frozen.

Only vectors of `rank` numbers cross between tensor ranks, never the layers' inputs or outputs. A of a column-parallel
layer and B of a row-parallel one are whole on every rank; the other factor is cut as the layer itself is.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from megacm3.config import Config
from megacm3.parallel import parts
from megacm3.parallel.context import ParallelContext
from megacm3.parallel.replicated import summed_over_tensor_ranks


def targets(config: Config, kinds: list[str]) -> list[str]:
    """Those of `kinds` (q, k, v, o, gate, up, down) that get an adapter."""
    return [kind for kind in kinds if config.train.parameters == "lora" and kind in config.lora.matrices]


class ColumnLora(torch.nn.Module):
    """Adapters of the matrices that one fused ColumnParallelLinear holds: [S, B, in] -> [T, B, sum of rows / TP]."""

    def __init__(
        self, name: str, width: int, rows: dict[str, int], config: Config, context: ParallelContext, dtype: torch.dtype
    ) -> None:
        """rows: global rows of each fused matrix, in their order, adapted or not."""
        super().__init__()
        self.context, rank, world = context, config.lora.rank, context.tensor
        self.scale = config.lora.alpha / rank
        self.chosen = targets(config, list(rows))
        self.rows = {kind: count // world for kind, count in rows.items()}
        count = sum(self.rows[kind] for kind in self.chosen)
        self.a = torch.nn.Parameter(torch.empty(rank * len(self.chosen), width, dtype=dtype, device=context.device))
        self.b = torch.nn.Parameter(torch.empty(count, rank, dtype=dtype, device=context.device))
        a, b, start = [], [], 0
        for i, kind in enumerate(self.chosen):
            shape = (rank, width)
            a.append(parts.Part(f"{name}.{kind}.lora_a", shape, (0, 0), shape, i * rank))
            b.append(parts.rows(f"{name}.{kind}.lora_b", (rows[kind], rank), context.tensor_rank, world, start))
            start += self.rows[kind]
        parts.attach(self.a, a, split=False)
        parts.attach(self.b, b, split=world > 1)

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """What is added to the layer's output."""
        context = self.context
        if context.sequence:
            # Each rank multiplies its own positions; the rank's gradient of A is a share of the sum.
            z = F.linear(x_SBH, summed_over_tensor_ranks(self.a, context))
            z = gather_from_sequence_parallel_region(z, tensor_parallel_output_grad=True, group=context.tensor_group)
        else:
            z = F.linear(x_SBH, self.a)
            if context.tensor > 1:
                z = copy_to_tensor_model_parallel_region(z, group=context.tensor_group)
        factors = dict(zip(self.chosen, z.chunk(len(self.chosen), dim=-1), strict=True))
        out, start = [], 0
        for kind, count in self.rows.items():
            if kind in factors:
                out.append(F.linear(factors[kind], self.b[start : start + count]))
                start += count
            else:
                out.append(z.new_zeros(*z.shape[:-1], count))
        return torch.cat(out, dim=-1) * self.scale


class RowLora(torch.nn.Module):
    """The adapter of a RowParallelLinear: [T, B, in / TP] -> [S, B, out]."""

    def __init__(
        self, name: str, width: int, rows: int, config: Config, context: ParallelContext, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.context, rank, world = context, config.lora.rank, context.tensor
        self.scale = config.lora.alpha / rank
        self.a = torch.nn.Parameter(torch.empty(rank, width // world, dtype=dtype, device=context.device))
        self.b = torch.nn.Parameter(torch.empty(rows, rank, dtype=dtype, device=context.device))
        a = parts.columns(f"{name}.lora_a", (rank, width), context.tensor_rank, world)
        parts.attach(self.a, [a], split=world > 1)
        parts.attach(self.b, [parts.whole(f"{name}.lora_b", (rows, rank))], split=False)

    def forward(self, x_TBI: torch.Tensor) -> torch.Tensor:
        """What is added to the layer's output."""
        context, z = self.context, F.linear(x_TBI, self.a)
        b: torch.Tensor = self.b
        if context.sequence:
            z = reduce_scatter_to_sequence_parallel_region(z, group=context.tensor_group)
            b = summed_over_tensor_ranks(b, context)
        elif context.tensor > 1:
            z = reduce_from_tensor_model_parallel_region(z, group=context.tensor_group)
        return F.linear(z, b) * self.scale
