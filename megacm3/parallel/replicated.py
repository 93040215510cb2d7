"""Parameters that every tensor rank holds in full, and the proof that they stay equal.

A DeepSpeed engine never sums their gradients over the tensor ranks. Where each rank sees only its own heads (q/k norms)
or its own positions (norms under sequence parallel) the sum is needed, and it is done inside autograd: the parameter
passes through megatron-core's copy region, whose forward is the identity and whose backward is the all-reduce.
"""

import hashlib

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


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    return torch.tensor(list(hashlib.blake2b(raw.tobytes(), digest_size=16).digest()), dtype=torch.uint8)


def check_replicas(module: torch.nn.Module, context: ParallelContext) -> None:
    """Raise CheckpointError, on every rank, naming the replicated parameters that differ over the tensor ranks.

    ZeRO-3 partitions are compared as they are: equal data ranks hold equal slices.
    """
    if context.tensor == 1:
        return
    named = replicas(module)
    names = []
    if named:  # a stage may hold none
        mine = torch.stack([_digest(getattr(p, "ds_tensor", p.data)) for _, p in named]).to(context.device)
        every = [torch.empty_like(mine) for _ in range(context.tensor)]
        dist.all_gather(every, mine, group=context.tensor_group)
        different = torch.stack([(other != every[0]).any(dim=1) for other in every]).any(dim=0)
        names = [name for (name, _), bad in zip(named, different.tolist(), strict=True) if bad]
    # All ranks of the model must stop together, not only the tensor group that differs.
    count = torch.tensor([len(names)], device=context.device)
    dist.all_reduce(count)
    if int(count):
        shown = ", ".join(names[:4]) or "a parameter of another pipeline stage"
        raise CheckpointError(
            f"replicated parameters differ over the tensor ranks: {shown}; nothing was saved. "
            "The last committed checkpoint is sound: resume from it"
        )
