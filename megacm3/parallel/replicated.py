"""Parameters that every tensor rank holds in full, and the proof that they stay equal.

A DeepSpeed engine never sums their gradients over the tensor ranks. Where each rank sees only its own heads (q/k norms)
or its own positions (norms under sequence parallel) the sum is needed, and it is done inside autograd: the parameter
passes through megatron-core's copy region, whose forward is the identity and whose backward is the all-reduce.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

from megacm3.errors import CheckpointError
from megacm3.parallel.context import ParallelContext
from megacm3.parallel.parts import parts_of


def summed_over_tensor_ranks(parameter: torch.Tensor, context: ParallelContext) -> torch.Tensor:
    """The parameter itself; its gradient becomes the sum of all tensor ranks' gradients."""
    if context.tensor == 1:
        return parameter
    return copy_to_tensor_model_parallel_region(parameter, group=context.tensor_group)


def replicas(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """(logical name, parameter) of every parameter that all tensor ranks hold in full."""
    return [(parts_of(p)[0].name, p) for p in module.parameters() if not p.tensor_model_parallel]  # type: ignore[attr-defined]


def _checksums(tensor: torch.Tensor) -> torch.Tensor:
    """int64 [2]: sums of a tensor's bits read as integers, over all of it and over its first half.

    One flipped bit always changes the first; it costs one pass at the speed of the memory.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    return torch.stack((bits.sum(dtype=torch.int64), bits[: len(bits) // 2].sum(dtype=torch.int64)))


def _differing(named: list[tuple[str, torch.Tensor]], group: Any, size: int) -> list[str]:
    """Words for the tensors that are not equal over a group: name and ranks."""
    if size == 1 or not named:  # a stage may hold none
        return []
    mine = torch.stack([_checksums(tensor) for _, tensor in named])
    every = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(every, mine, group=group)
    ranks = dist.get_process_group_ranks(group)
    told = []
    for index, (name, _) in enumerate(named):
        other = [ranks[i] for i in range(1, size) if not torch.equal(every[i][index], every[0][index])]
        if other:
            told.append(f"{name} on rank {', '.join(map(str, other[:8]))} is not that of rank {ranks[0]}")
    return told


def check_replicas(module: torch.nn.Module, context: ParallelContext, *, data: bool = True) -> None:
    """Raise CheckpointError, on every rank, naming the parameters and ranks where equal ones have come apart.

    Compared are replicated parameters over the tensor ranks and, with `data`, all parameters over the data ranks.
    ZeRO-3 partitions are compared as they are: equal data ranks hold equal slices. Collective.
    """
    equal = [(name, getattr(p, "ds_tensor", p.data)) for name, p in replicas(module)]
    told = _differing(equal, context.tensor_group, context.tensor)
    if data:
        own = [(parts_of(p)[0].name, p.data) for p in module.parameters()]
        told += _differing(own, context.data_group, context.data)
    # All ranks must stop together, not only the group that differs.
    count = torch.tensor([len(told)])
    dist.all_reduce(count, group=context.control_group)
    if int(count):
        every: list[Any] = [None] * context.world
        dist.all_gather_object(every, told, group=context.control_group)
        shown = "; ".join(list(dict.fromkeys(text for texts in every for text in texts))[:4])
        raise CheckpointError(
            f"replicated parameters differ: {shown}; nothing was saved. "
            "The last committed checkpoint is sound: resume from it"
        )
