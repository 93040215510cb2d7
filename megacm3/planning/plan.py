"""The whole plan of a run: what the ranks of each stage hold and hand on, how long a step might take, what fits.

Bytes, FLOPs and collectives are those of counts.py, memory.py and traffic.py, which say what tests hold them to. Times
and the order of suggestions are derived from data sheets and were not measured on GPUs.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megacm3.config import Config, ParallelConfig
from megacm3.errors import ConfigError
from megacm3.parallel.deepspeed_json import DEFAULT_JSON
from megacm3.planning.counts import sequence_flops
from megacm3.planning.layout import Layout, bubble, layout_of, rank_parameters
from megacm3.planning.memory import Memory, activation_bytes, buffer_bytes, state_bytes
from megacm3.planning.traffic import Traffic, step_traffic
from megacm3.rules import check
from megacm3.training.flops import PEAKS

GB = 2**30

USABLE = 0.92
"""Share of a GPU's memory that a plan may fill: the rest goes to the CUDA context, NCCL and fragments (our choice)."""

EFFICIENCY = 0.5
"""Share of the peak that matrix products are taken to reach (our choice: well-tuned trainers report 0.4 to 0.6)."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, from NVIDIA's data sheets; rates are bytes a second in one direction."""

    name: str
    memory: int
    """Bytes."""
    peak: float
    """bf16 operations a second, without sparsity."""
    link: float
    """To the other GPUs of its node."""
    network: float
    """To other nodes, for each GPU (inferred: one adapter a GPU of the generation's usual speed)."""
    node: int = 8
    """GPUs of a node."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40g", 40 * GB, PEAKS["A100"], 300e9, 25e9),
        Gpu("a100-80g", 80 * GB, PEAKS["A100"], 300e9, 25e9),
        Gpu("h100-80g", 80 * GB, PEAKS["H100"], 450e9, 50e9),
        Gpu("h200-141g", 140 * GB, PEAKS["H200"], 450e9, 50e9),
        Gpu("l40s-48g", 48 * GB, PEAKS["L40S"], 32e9, 25e9),
    )
}


def gpu(name: str) -> Gpu:
    """A kind of GPU by name. Raises ConfigError with the list of names."""
    if name not in GPUS:
        raise ConfigError(f"--gpu {name}; expected one of {', '.join(GPUS)}")
    return GPUS[name]


@dataclass(frozen=True)
class StagePlan:
    """A rank of one pipeline stage."""

    stage: int
    parameters: int
    memory: Memory
    traffic: list[Traffic]


@dataclass(frozen=True)
class Plan:
    """The estimate of a config on a number of ranks."""

    config: Config
    layout: Layout
    stages: list[StagePlan]

    @property
    def worst(self) -> StagePlan:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def rank_flops(self) -> int:
        """Executed by a rank in a step, recomputation included, with equal stages."""
        layout = self.layout
        sequences = layout.micro_batch * layout.micro_batches
        return sequence_flops(self.config.model, layout.recompute) * sequences // (layout.tensor * layout.pipeline)

    def fits(self, kind: Gpu) -> bool:
        """Whether every rank stays within what is usable of a GPU."""
        return self.worst.memory.total <= USABLE * kind.memory

    def step_seconds(self, kind: Gpu) -> float:
        """Derived: products at EFFICIENCY of the peak, tensor traffic open, gradients hidden behind half of them."""
        layout, busiest = self.layout, self.worst.traffic
        compute = self.rank_flops / (EFFICIENCY * kind.peak)
        near = kind.link if layout.tensor <= kind.node else kind.network
        far = kind.link if layout.world <= kind.node else kind.network
        tensor = sum(item.sent for item in busiest if item.axis == "tensor") / near
        data = sum(item.sent for item in busiest if item.axis == "data") / far
        hand_on = sum(item.sent for item in busiest if item.axis == "pipeline") / far
        return (compute + tensor + hand_on) / (1 - bubble(layout)) + max(0.0, data - compute / 2)


def make_plan(config: Config, world: int) -> Plan:
    """The plan of a config on `world` ranks. Raises ConfigError for a layout that is not legal."""
    layout, stages = layout_of(config, world), []
    for stage in range(layout.pipeline):
        count = rank_parameters(config.model, layout, stage)
        memory = replace(
            state_bytes(count, layout, config.optimizer.kind),
            activations=activation_bytes(config, layout, stage),
            buffers=buffer_bytes(config, layout, stage, count),
        )
        stages.append(StagePlan(stage, count, memory, step_traffic(config, layout, stage, count)))
    return Plan(config, layout, stages)


def with_layout(config: Config, parallel: ParallelConfig, zero: int, micro_batch: int) -> Config:
    """A config cut differently; `zero` names a file of ds_configs/. Raises ConfigError when a rule forbids it."""
    train = replace(config.train, micro_batch=micro_batch)
    json = DEFAULT_JSON.with_name(f"zero{zero}.json")
    made = replace(config, parallel=parallel, train=train, deepspeed=str(json))
    check(made)
    return made


def layouts(config: Config, world: int, kind: Gpu) -> Iterator[Plan]:
    """Plans of every legal layout worth a look: tensor ranks within a node, sequence parallel with them."""
    tensors = [n for n in (1, 2, 4, 8) if n <= kind.node]
    pipelines = [n for n in range(1, min(config.model.layers, world) + 1) if config.model.layers % n == 0]
    for tensor, pipeline in itertools.product(tensors, pipelines):
        if world % (tensor * pipeline):
            continue
        for zero, recompute, size in itertools.product((1, 2, 3), ("none", "selective", "full"), (1, 2, 4, 8)):
            parallel = ParallelConfig(tensor, pipeline, tensor > 1, recompute)
            try:
                yield make_plan(with_layout(config, parallel, zero, size), world)
            except ConfigError:  # not legal, such as ZeRO-2 under a pipeline
                continue


def suggest(config: Config, world: int, kind: Gpu, count: int = 3) -> list[Plan]:
    """The layouts that fit, by derived step time; of equal ones the simplest. Raises ConfigError when none fits."""

    def cost(plan: Plan) -> tuple[float, int, int, int]:
        layout = plan.layout
        return round(plan.step_seconds(kind), 3), layout.pipeline, layout.tensor, layout.zero

    tried = list(layouts(config, world, kind))
    if not tried:
        raise ConfigError(
            f"no legal layout for {world} GPUs and train.global_batch = {config.train.global_batch}; "
            "change --gpus to a number that divides the batch, or train.global_batch"
        )
    fitting = sorted((plan for plan in tried if plan.fits(kind)), key=cost)
    if not fitting:
        least = min(tried, key=lambda plan: plan.worst.memory.total)
        raise ConfigError(
            f"{config.model.preset or 'the model'} does not fit {world} x {kind.name}: the leanest layout "
            f"({describe(least)}) needs {least.worst.memory.total / GB:.1f} of "
            f"{USABLE * kind.memory / GB:.1f} GiB a GPU; raise --gpus, or offload with "
            "deepspeed=ds_configs/zero3_offload.json"
        )
    return fitting[:count]


def describe(plan: Plan) -> str:
    """The config keys of a plan's layout."""
    layout = plan.layout
    keys = f"parallel.tensor={layout.tensor} parallel.pipeline={layout.pipeline}"
    keys += f" parallel.sequence={str(layout.sequence).lower()} parallel.recompute={layout.recompute}"
    name = Path(plan.config.deepspeed or "zero1.json").name
    return f"{keys} train.micro_batch={layout.micro_batch} deepspeed=ds_configs/{name}"
