"""Bytes that a rank holds: states, activations, buffers. Pure functions.

The figures describe this package's own implementation, and each is held to the real thing by a test: states to the
storages of real ranks, activations to what is alive after a forward pass.
"""

from dataclasses import dataclass, replace

from megacm3.config import Config
from megacm3.planning.counts import table_rows
from megacm3.planning.layout import Layout, gathered

CHUNK = 1024
"""Tokens of a chunk of the loss (model/loss.py, which needs torch to be imported)."""

PIECE = 500_000_000
"""Numbers after which DeepSpeed ends a flattened piece of gradients (its MEMORY_OPT_ALLREDUCE_SIZE)."""


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
