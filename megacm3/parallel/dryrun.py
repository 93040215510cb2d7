"""Builds every rank's stage of a layout on the meta device, under a fake process group, and runs one micro-batch of it.

Data ranks do not differ, so each (stage, tensor rank) is built once; the micro-batch runs on a stage's first tensor
rank, since the others have tensors of the same shapes. No weight and no activation exists, so that a layout for a
thousand GPUs is tried in seconds on one CPU core: shapes that do not fit, tensors that no rank holds, and collectives
that the estimate does not know of show here.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megacm3.config import Config
from megacm3.errors import ConfigError
from megacm3.model.block import pack
from megacm3.model.loss import LossState
from megacm3.model.stages import Network, Stage, list_stages
from megacm3.parallel.context import ParallelContext, build_context, check_world
from megacm3.parallel.cpu import prepare, pretending
from megacm3.parallel.parts import Part, named_parts
from megacm3.parallel.pipeline import bounds

META = torch.device("meta")

OPERATIONS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "broadcast": "broadcast",
    "send": "send",
    "recv_any_source": "receive",
    "recv": "receive",
}


class CollectiveCounter(TorchDispatchMode):
    """Counts collectives and their bytes, by operation: those of the largest tensor list of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function._overloadpacket.__name__.rstrip("_")
            name = OPERATIONS.get(name, name)
            self.count[name] += 1
            self.bytes[name] += max((_bytes(argument) for argument in args), default=0)
        return function(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(item) for item in value) if isinstance(value, (list, tuple)) else 0


@dataclass
class RankReport:
    """What a dry run found on the ranks of one pipeline stage and tensor rank."""

    stage: int
    tensor_rank: int
    parameters: int
    """Numbers held, padding rows included."""
    parts: list[Part]
    flops: int = 0
    """Of one micro-batch, forward and backward; 0 where it did not run."""
    count: dict[str, int] = field(default_factory=dict)
    """Collectives of one micro-batch by operation."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Of their whole tensors."""


@dataclass
class DryRun:
    """The outcome of all ranks."""

    reports: list[RankReport]
    parameters: int
    """Numbers in the union of what all ranks hold: equal to the dense count, or the run would have failed."""
    ranks: int
    """How many ranks the reports stand for."""
    seconds: float


@contextmanager
def fake_world(world: int, rank: int) -> Iterator[None]:
    """A default process group of `world` ranks of which only this one exists; its collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ConfigError("a dry run needs a process without torch.distributed; start tools/plan.py by itself")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def dry_run(config: Config, world: int, seen: Callable[[RankReport], None] = lambda _: None) -> DryRun:
    """Every distinct rank of `config` on `world` ranks. `seen` is called with each report as it is made.

    Raises ConfigError for a layout that is not legal, or when the ranks together do not hold every tensor exactly.
    """
    from megacm3.planning.counts import parameters

    begun, reports = time.monotonic(), []
    data = check_world(config, world)
    prepare(torch.device("cpu"))
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    for stage in range(pipeline):
        for tensor_rank in range(tensor):
            with pretending(META), fake_world(world, stage * data * tensor + tensor_rank):
                reports.append(_rank_report(config, build_context(config, META)))
            seen(reports[-1])
    found = count_once(reports)
    dense = parameters(config.model)
    if found != dense:
        raise ConfigError(f"the ranks together hold {found:,} numbers; the model has {dense:,}")
    return DryRun(reports, found, world, time.monotonic() - begun)


def count_once(reports: list[RankReport]) -> int:
    """Numbers in the union of all ranks' boxes. Raises ConfigError when boxes of a tensor do not add up to it."""
    boxes = {(part.name, part.offset): part for report in reports for part in report.parts}
    held: Counter[str] = Counter()
    for part in boxes.values():
        held[part.name] += math.prod(part.shape)
    for part in boxes.values():
        if held[part.name] != math.prod(part.global_shape):
            expected = math.prod(part.global_shape)
            raise ConfigError(f"{part.name} has {expected:,} numbers; ranks hold {held[part.name]:,}")
    return sum(held.values())


def _rank_report(config: Config, context: ParallelContext) -> RankReport:
    state = LossState()
    kinds = torch.zeros(config.model.vocab_size, dtype=torch.uint8, device="cpu")
    forward, modules = _stage(list_stages(config, context, kinds, state), context)
    held = [part for module in modules for _, part in named_parts(module)]
    report = RankReport(
        stage=context.pipeline_rank,
        tensor_rank=context.tensor_rank,
        parameters=sum(p.numel() for module in modules for p in module.parameters()),
        parts=held,
    )
    if context.tensor_rank:
        return report
    with CollectiveCounter() as collectives, FlopCounterMode(display=False, custom_mapping=FORMULAS) as flops:
        _micro_batch(forward, config, context)
    report.flops = flops.get_total_flops()
    report.count, report.bytes = dict(collectives.count), dict(collectives.bytes)
    return report


def _stage(stages: list[Stage], context: ParallelContext) -> tuple[Callable[[Any], Any], list[torch.nn.Module]]:
    """(forward of this rank's share of the stages, its modules), as parallel/pipeline.py cuts them."""
    if context.pipeline == 1:
        network = Network(stages)
        return lambda inputs: network(*inputs), [network]
    edges = bounds([stage.is_block for stage in stages], context.pipeline)
    mine = stages[edges[context.pipeline_rank] : edges[context.pipeline_rank + 1]]
    modules = [stage.build() for stage in mine]

    def forward(inputs: Any) -> Any:
        for stage, module in zip(mine, modules, strict=True):
            inputs = stage.tied_call(module, inputs) if stage.tied_call else module(inputs)
        return inputs

    return forward, modules


def _micro_batch(forward: Callable[[Any], Any], config: Config, context: ParallelContext) -> None:
    size, length = config.train.micro_batch, config.model.sequence_length
    ids = torch.zeros(size, length, dtype=torch.int64)
    meta = pack(torch.zeros(size, dtype=torch.int64), ids, ids)
    first: torch.Tensor = ids
    if context.pipeline_rank:
        dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
        own = length // (context.tensor if context.sequence else 1)
        first = torch.zeros(own, size, config.model.hidden_size, dtype=dtype, requires_grad=True)
    out = forward((first, meta))
    result = out if isinstance(out, torch.Tensor) else out[0]
    result.backward(torch.ones_like(result))


def _addmm_(into: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * int(a[0]) * int(a[1]) * int(b[1])


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    batch, heads, length, size = query
    return 2 * 2 * int(batch * heads * length * key[2] * size)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return 2 * _attention(query, key, value)


FORMULAS = {
    torch.ops.aten.addmm_: _addmm_,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""What torch's counter leaves out: the in-place product of the loss, and the CPU's flash attention (counted, as the
model FLOPs are, without the scores that its backward pass computes again)."""
