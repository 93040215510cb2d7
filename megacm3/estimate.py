"""What a model costs in a layout: parameters, FLOPs, bytes on a rank, the pipeline's bubble. Pure functions.

The figures describe this package's own implementation, and each is held to the real thing by a test: FLOPs to torch's
counter, states to the storages of real ranks, activations to what is alive after a forward pass. Communication is in
traffic.py. A "number" is one element of a tensor, a "token" one position of one sequence.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megacm3.config import Config, ModelConfig
from megacm3.parallel.context import accumulation, check_world
from megacm3.parallel.deepspeed_json import fill_deepspeed_json, offloads, zero_stage
from megacm3.plan_zero3 import Gathering, gathering, micro_batch_order

Shapes = dict[str, tuple[int, ...]]

CHUNK = 1024
"""Tokens of a chunk of the loss (model/loss.py, which needs torch to be imported)."""

PIECE = 500_000_000
"""Numbers after which DeepSpeed ends a flattened piece of gradients (its MEMORY_OPT_ALLREDUCE_SIZE)."""


def logical_shapes(model: ModelConfig) -> Shapes:
    """Name and shape of every logical tensor, in the order of the network."""
    hidden, size = model.hidden_size, model.hidden_size // model.heads
    norm: Shapes = {"weight": (hidden,)} if model.norm == "rmsnorm" else {}
    head_norm = {"none": (), "rmsnorm": ("weight",), "layernorm": ("weight", "bias")}[model.qk_norm]
    shapes: Shapes = {"embed.weight": (model.vocab_size, hidden)}
    if model.positions == "learned":
        shapes["positions.weight"] = (model.sequence_length, hidden)
    for i in range(model.layers):
        layer: Shapes = {f"attn_norm.{kind}": shape for kind, shape in norm.items()}
        for name, heads in (("q", model.heads), ("k", model.kv_heads), ("v", model.kv_heads)):
            layer[f"attn.{name}.weight"] = (heads * size, hidden)
        layer["attn.o.weight"] = (hidden, hidden)
        for name, heads in (("q_norm", model.heads), ("k_norm", model.kv_heads)):
            layer |= {f"attn.{name}.{kind}": (min(model.qk_norm_groups, heads), size) for kind in head_norm}
        layer |= {f"mlp_norm.{kind}": shape for kind, shape in norm.items()}
        for name in ("gate", "up") if model.activation == "swiglu" else ("up",):
            layer[f"mlp.{name}.weight"] = (model.ffn_size, hidden)
        layer["mlp.down.weight"] = (hidden, model.ffn_size)
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes |= {f"final_norm.{kind}": shape for kind, shape in norm.items()}
    if not model.tied:
        shapes["head.weight"] = (model.vocab_size, hidden)
    return shapes


def parameters(model: ModelConfig) -> int:
    """Numbers in all logical tensors: the parameter count, padding rows of the table left out."""
    return sum(math.prod(shape) for shape in logical_shapes(model).values())


def is_replicated(name: str) -> bool:
    """Whether every tensor rank holds the whole of a logical tensor."""
    return "norm" in name or name == "positions.weight"


def table_rows(model: ModelConfig) -> int:
    """Rows of the embedding table, padding included."""
    return model.vocab_rows or model.vocab_size


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


@dataclass(frozen=True)
class Flops:
    """Of the matrix products of one sequence's forward pass; a product of [m, k] and [k, n] is 2 m k n.

    Attention counts the full square of positions, as torch's FlopCounterMode does: a causal kernel skips up to half.
    """

    projections: int
    attention: int
    feed_forward: int
    head: int

    @property
    def blocks(self) -> int:
        """All blocks together."""
        return self.projections + self.attention + self.feed_forward


def forward_flops(model: ModelConfig) -> Flops:
    """Of one sequence of the model's length, over all ranks."""
    length, hidden, size = model.sequence_length, model.hidden_size, model.hidden_size // model.heads
    matrices = 3 if model.activation == "swiglu" else 2
    return Flops(
        projections=model.layers * 2 * length * hidden * 2 * (model.heads + model.kv_heads) * size,
        attention=model.layers * 2 * 2 * length * length * model.heads * size,
        feed_forward=model.layers * matrices * 2 * length * hidden * model.ffn_size,
        head=2 * length * hidden * table_rows(model),
    )


def sequence_flops(model: ModelConfig, recompute: str = "none") -> int:
    """Of one sequence, forward and backward (twice the forward pass), over all ranks.

    With `recompute` none these are the model FLOPs, against which utilisation is measured; what is computed again is
    executed, but no model FLOPs.
    """
    forward = forward_flops(model)
    again = {"none": 0, "selective": forward.attention, "full": forward.blocks}[recompute]
    return 3 * (forward.blocks + forward.head) + again


def flops_per_token(model: ModelConfig) -> float:
    """Model FLOPs of training on one token."""
    return sequence_flops(model) / model.sequence_length


def bubble(layout: Layout) -> float:
    """Share of a step that a stage waits, with equal stages under 1F1B, DeepSpeed's schedule: (p-1) / (m+p-1)."""
    return (layout.pipeline - 1) / (layout.micro_batches + layout.pipeline - 1)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    parameters: int
    gradients: int
    """As many as exist at once between two micro-batches or before the optimizer's step."""
    optimizer: int
    """Moments, and fp32 copies of the weights where there are any."""
    host: int = 0
    """What offloading keeps in the CPU's memory."""
    activations: int = 0
    """Kept for the backward pass, all micro-batches in flight."""
    buffers: int = 0
    """That come and go: of the loss, of recomputation, of the reduction of gradients, of gathered weights."""

    @property
    def states(self) -> int:
        """Parameters, gradients and optimizer on the device."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Everything on the device, at the worst moment of a step."""
        return self.states + self.activations + self.buffers


def state_bytes(count: int, layout: Layout, optimizer: str = "adamw") -> Memory:
    """Weights, gradients and optimizer of `count` local numbers under DeepSpeed's ZeRO (docs: DeepSpeed ZeRO stages).

    Measured on ranks by tests/dist/test_estimate.py; padding to a multiple of the ranks is left out.
    """
    share = -(-count // layout.data)
    bf16 = layout.width == 2
    moments = 8 if optimizer == "adamw" else 0
    master = 4 if layout.zero or bf16 else 0  # ZeRO updates a copy, in fp32 too
    adam = (master + moments) * (share if layout.zero else count)
    weights = layout.width * (share if layout.zero == 3 else count)
    if layout.zero >= 2:
        gradients = layout.gradient_width * share
    elif layout.zero == 1 and bf16 and layout.gradient_width == 4:
        gradients = 4 * count  # the fp32 sums stay for good; bf16 gradients are dropped one by one
    elif layout.zero == 1 and layout.micro_batches == 1:
        gradients = layout.width * share  # reduced bucket by bucket during the backward pass
    else:
        gradients = layout.width * count
    host = 0
    if layout.offload_optimizer:
        # fp32 weights, moments and gradients, and a buffer from which updated weights go back.
        host, adam = adam + (4 + layout.width) * share, 0
    if layout.offload_param:
        host, weights = host + weights, 0
    return Memory(weights, gradients, adam, host)


def block_activations(config: Config, layout: Layout) -> int:
    """Bytes that one block keeps for the backward pass of one micro-batch."""
    model, width, tensor = config.model, layout.width, layout.tensor
    hidden, kv = model.hidden_size, model.kv_heads * (model.hidden_size // model.heads)
    tokens = layout.micro_batch * model.sequence_length
    if layout.recompute == "full":
        return tokens * width * hidden // layout.shards
    statistics = 4 if model.norm == "rmsnorm" else 8
    # Input and output of both norms: the residual stream, and what the parallel layers read (or write, in swin order).
    token = (4 * width * hidden + 2 * statistics) / layout.shards
    token += width * (hidden + 2 * kv) / tensor  # q, k, v in one tensor
    token += width * hidden / tensor  # what the output projection reads
    if layout.recompute == "none":
        token += _head_activations(config, layout)
    token += width * model.ffn_size * (3 if model.activation == "swiglu" else 1) / tensor
    if model.dropout:
        token += 2 * hidden / layout.shards  # masks, a byte each
    return round(tokens * token)


def _head_activations(config: Config, layout: Layout) -> float:
    # A token's q/k norms, rotated q and k, and attention's own: what `recompute: selective` computes again.
    model, width = config.model, layout.width
    heads, hidden = model.heads + model.kv_heads, model.hidden_size
    kv = model.kv_heads * (hidden // model.heads)
    token = 4.0 * model.heads  # log of the softmax's sums
    if model.qk_norm != "none":
        token += (4 if model.qk_norm == "rmsnorm" else 8) * heads
    if model.qk_norm == "layernorm" and model.qk_norm_groups > 1:
        token += width * (hidden + kv)
    if model.positions == "rope" or model.qk_norm != "none":
        token += width * (hidden + kv)
    if layout.micro_batch > 1:
        token += width * hidden  # attention's output in its own order of axes
    token /= layout.tensor
    return token + (width * model.sequence_length if config.data.document_mask else 0)


def activation_bytes(config: Config, layout: Layout, stage: int) -> int:
    """Bytes that a rank of a pipeline stage keeps for the backward pass, all micro-batches in flight."""
    model = config.model
    tokens = layout.micro_batch * model.sequence_length
    one = model.layers // layout.pipeline * block_activations(config, layout)
    if stage == 0:
        one += tokens * (8 + (layout.tensor > 1))  # ids, and which of them the rank holds
    if stage == layout.pipeline - 1:
        one += tokens * layout.width * model.hidden_size // layout.shards  # what the last norm reads
        one += tokens * layout.width * model.hidden_size  # the gradient that the loss has ready
    if layout.pipeline > 1 and stage > 0:
        one += tokens * layout.width * model.hidden_size // layout.shards  # what was received
    table = 4 * table_rows(model) // layout.tensor * model.hidden_size if stage == layout.pipeline - 1 else 0
    return min(layout.micro_batches, layout.pipeline - stage) * one + table


def buffer_bytes(config: Config, layout: Layout, stage: int, count: int) -> int:
    """Bytes that come and go: the most of the loss's, a recomputed block's and the optimizer step's, and ZeRO's own."""
    model = config.model
    tokens, rows = layout.micro_batch * model.sequence_length, table_rows(model) // layout.tensor
    loss = again = 0
    if stage == layout.pipeline - 1:
        chunk, low = min(CHUNK, tokens), 2 if layout.width == 2 else 0
        # The hidden states of all positions, logits in fp32 (and bf16), the table's gradient of a chunk in bf16.
        loss = tokens * layout.width * model.hidden_size + chunk * rows * (4 + 2 * low) + low * rows * model.hidden_size
    if layout.recompute == "full":
        again = block_activations(config, replace(layout, recompute="none"))
    step = 4 * count if layout.zero == 0 and layout.width == 2 else 4 * -(-count // layout.data)
    flat, kept = _reduction_bytes(layout, count, rows * model.hidden_size)
    if layout.zero == 3:
        kept += gathered(model, layout).peak * layout.width
    return max(loss, again, step, flat) + kept + hand_off_bytes(config, layout, stage)


def _reduction_bytes(layout: Layout, count: int, table: int) -> tuple[int, int]:
    # (gradients flattened after the last backward pass, buckets during it). Without ZeRO, and at ZeRO-1 with sums in
    # fp32, DeepSpeed lays gradients end to end in pieces of PIECE numbers, and once more in what it reduces them in.
    if layout.zero == 0 and layout.data == 1:
        return 0, 0
    if layout.zero == 0 or (layout.zero == 1 and layout.gradient_width > layout.width):
        again = layout.reduced_width if layout.reduced_width != layout.gradient_width else 0
        return min(count, PIECE + table) * (layout.gradient_width + again), 0
    staged = layout.gradient_width if layout.zero == 1 else layout.width
    return 0, layout.bucket * staged * (1 if layout.zero == 3 else 2)


def hand_off_bytes(config: Config, layout: Layout, stage: int) -> int:
    """Of hidden states that DeepSpeed's pipeline holds on to after the last backward pass of a step.

    A stage receives activations and gradients in buffers of their own. The last one never drops the losses of its two
    slots, whose graphs end in the received activations and their gradients.
    """
    if layout.pipeline == 1:
        return 0
    last = stage == layout.pipeline - 1
    hidden = layout.micro_batch * config.model.sequence_length * config.model.hidden_size // layout.shards
    return layout.width * hidden * ((stage > 0) + (not last) + 2 * last * min(2, layout.micro_batches))
