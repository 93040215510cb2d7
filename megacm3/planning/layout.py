"""How a run is cut over its ranks, and what a rank of a stage then holds. Pure functions."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megacm3.config import Config, ModelConfig
from megacm3.parallel.context import accumulation, check_world
from megacm3.parallel.deepspeed_json import fill_deepspeed_json, offloads, zero_stage
from megacm3.planning.counts import is_replicated, logical_shapes, table_rows
from megacm3.planning.zero3 import Gathering, gathering, micro_batch_order


@dataclass(frozen=True)
class Layout:
    """How a run is cut, with everything that decides its bytes."""

    world: int
    tensor: int
    pipeline: int
    data: int
    sequence: bool
    recompute: str
    zero: int
    offload_optimizer: bool
    offload_param: bool
    micro_batch: int
    micro_batches: int
    """Micro-batches of a step on each data-parallel rank."""
    width: int
    """Bytes of a weight or activation: 2 in bf16, 4 in fp32."""
    gradient_width: int
    """Bytes of a summed gradient."""
    reduced_width: int
    """Bytes of a gradient on its way between data ranks: by default those of a weight, whatever it is summed up in."""
    bucket: int
    """Numbers in a buffer that reduces gradients; 0 without ZeRO."""
    reach: int
    """ZeRO-3 keeps a gathered weight that comes again before so many numbers."""
    ahead: int
    """Numbers that ZeRO-3 gathers in advance at each module."""
    live: int
    """Whole numbers at which ZeRO-3 stops gathering in advance."""

    @property
    def shards(self) -> int:
        """Tensor ranks that share the positions outside the parallel layers."""
        return self.tensor if self.sequence else 1


def layout_of(config: Config, world: int) -> Layout:
    """The layout that a config has on `world` ranks. Raises ConfigError for one that is not legal."""
    data = check_world(config, world)
    json = fill_deepspeed_json(config, data)
    stage, zero = zero_stage(json), json["zero_optimization"]
    width = 2 if config.train.dtype == "bf16" else 4
    return Layout(
        world=world,
        tensor=config.parallel.tensor,
        pipeline=config.parallel.pipeline,
        data=data,
        sequence=config.parallel.sequence,
        recompute=config.parallel.recompute,
        zero=stage,
        offload_optimizer=offloads(json, "optimizer"),
        offload_param=offloads(json, "param"),
        micro_batch=config.train.micro_batch,
        micro_batches=accumulation(config, data),
        width=width,
        gradient_width=4 if json["data_types"]["grad_accum_dtype"] == "fp32" else 2,
        reduced_width={"fp32": 4, "bf16": 2, "fp16": 2}.get(str(json.get("communication_data_type")).lower(), width),
        bucket=int(zero.get("reduce_bucket_size", 500_000_000)) if stage else 0,
        reach=int(zero.get("stage3_max_reuse_distance", 1e9)),
        ahead=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        live=int(zero.get("stage3_max_live_parameters", 1e9)),
    )


def stage_names(model: ModelConfig, pipeline: int, stage: int) -> Iterator[str]:
    """Logical tensors that a pipeline stage holds; a tied table stands on the first and on the last."""
    low, high = stage * model.layers // pipeline, (stage + 1) * model.layers // pipeline
    last = stage == pipeline - 1
    for name in logical_shapes(model):
        if name.startswith("layers."):
            held = low <= int(name.split(".")[1]) < high
        elif name.startswith(("final_norm", "head")):
            held = last
        else:
            held = stage == 0 or (name == "embed.weight" and model.tied and last)
        if held:
            yield name


def rank_parameters(model: ModelConfig, layout: Layout, stage: int) -> int:
    """Numbers that a rank of a pipeline stage holds before ZeRO cuts them, padding rows of the tables included."""
    shapes = logical_shapes(model)
    return sum(_rank_share(model, layout, name, shapes[name]) for name in stage_names(model, layout.pipeline, stage))


def _rank_share(model: ModelConfig, layout: Layout, name: str, shape: tuple[int, ...]) -> int:
    if name in ("embed.weight", "head.weight"):
        return table_rows(model) * model.hidden_size // layout.tensor
    return math.prod(shape) // (1 if is_replicated(name) else layout.tensor)


def gathered(model: ModelConfig, layout: Layout) -> Gathering:
    """What ZeRO-3 gathers in a micro-batch. Norms count as gathered with the rest, though it keeps them whole."""
    sizes: dict[str, int] = {}
    for name, shape in logical_shapes(model).items():
        *module, _ = name.split(".")
        for parts, fused in ((("q", "k", "v"), "qkv"), (("gate", "up"), "up")):
            module = [fused if part in parts else part for part in module]
        key = ".".join(module)
        sizes[key] = sizes.get(key, 0) + _rank_share(model, layout, name, shape)
    blocks = [[key for key in sizes if key.startswith(f"layers.{i}.")] for i in range(model.layers)]
    first = ["embed"] + ["positions"] * ("positions" in sizes)
    last = "embed" if model.tied else "head"
    order = micro_batch_order(first, blocks, last, layout.recompute == "full")
    return gathering(order, tuple(sizes.items()), layout.reach, layout.ahead, layout.live)


def bubble(layout: Layout) -> float:
    """Share of a step that a stage waits, with equal stages under 1F1B, DeepSpeed's schedule: (p-1) / (m+p-1)."""
    return (layout.pipeline - 1) / (layout.micro_batches + layout.pipeline - 1)
