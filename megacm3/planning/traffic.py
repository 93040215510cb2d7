"""What one rank hands to each kind of communication in a step. Pure functions; figures as in memory.py.

Bytes are those of the whole tensor: what an all-reduce sums, an all-gather ends with, a reduce-scatter begins with.
tests/unit/parallel/test_dryrun.py compares the tensor axis with collectives counted on the meta device, to the digit;
tests/dist/test_estimate.py all three axes with those of real ranks, within 1 %. Sums of a few numbers (norms, flags)
are left out, and what DeepSpeed sends through a group of one rank.
"""

from dataclasses import dataclass

from megacm3.config import Config
from megacm3.planning.counts import table_rows
from megacm3.planning.layout import Layout, gathered
from megacm3.planning.memory import CHUNK


@dataclass(frozen=True)
class Traffic:
    """One kind of communication of a step, on one rank of a pipeline stage."""

    axis: str
    """tensor | data | pipeline."""
    operation: str
    """all_reduce | all_gather | reduce_scatter | send."""
    count: int
    bytes: int
    """Of the whole tensors, all calls together."""
    ranks: int
    """In the group."""

    @property
    def sent(self) -> int:
        """Bytes that leave the rank with ring algorithms."""
        if self.operation == "send":
            return self.bytes
        once = self.bytes * (self.ranks - 1) // self.ranks
        return 2 * once if self.operation == "all_reduce" else once


def _again(config: Config, layout: Layout) -> tuple[int, int]:
    # (entries into, exits from) parallel regions of a block that recomputation runs through once more: it stops as soon
    # as the last kept tensor is there, which is before the last exit unless something behind it keeps one.
    if layout.recompute != "full":
        return 0, 0
    behind = config.model.norm_order == "swin" or config.model.dropout > 0
    return 2, 2 if behind else 1


def tensor_traffic(config: Config, layout: Layout, stage: int) -> list[Traffic]:
    """Within a tensor group, for a step: megatron-core's layers, the loss, gradients of replicated parameters."""
    if layout.tensor == 1:
        return []
    model, last = config.model, stage == layout.pipeline - 1
    blocks = model.layers // layout.pipeline
    tokens = layout.micro_batch * model.sequence_length
    whole = tokens * model.hidden_size * layout.width
    entries, exits = _again(config, layout)
    counts = {"all_reduce": 0, "all_gather": 0, "reduce_scatter": 0}
    if layout.sequence:
        # Each entry gathers, each exit scatters; the backward pass does the opposite, and gathers inputs once more.
        counts["all_gather"] = blocks * (2 + 4 + entries) + last + (stage == 0)
        counts["reduce_scatter"] = blocks * (2 + 2 + exits) + last
        counts["all_reduce"] = int(stage == 0)
    else:
        counts["all_reduce"] = blocks * (2 + 2 + exits) + last + (stage == 0)
    traffic = {name: [count, count * whole] for name, count in counts.items()}
    for count, numbers in _small_sums(config, layout, blocks, last):
        traffic["all_reduce"][0] += count
        traffic["all_reduce"][1] += numbers * layout.width
    if last:
        traffic["all_reduce"][0] += 2 * -(-tokens // CHUNK)
        traffic["all_reduce"][1] += 3 * 4 * tokens  # maximum, sum and the target's logit of each token, fp32
    m = layout.micro_batches
    return [Traffic("tensor", name, m * c, m * b, layout.tensor) for name, (c, b) in traffic.items() if c]


def _small_sums(config: Config, layout: Layout, blocks: int, last: bool) -> list[tuple[int, int]]:
    # (calls, numbers) for gradients of parameters that all tensor ranks hold.
    model = config.model
    sums = []
    if model.qk_norm != "none":
        rows = min(model.qk_norm_groups, model.heads) + min(model.qk_norm_groups, model.kv_heads)
        kinds = 2 if model.qk_norm == "layernorm" else 1
        sums.append((2 * kinds * blocks, kinds * blocks * rows * (model.hidden_size // model.heads)))
    if model.norm == "rmsnorm" and layout.sequence:
        norms = 2 * blocks + last
        sums.append((norms, norms * model.hidden_size))
    return sums


def data_traffic(config: Config, layout: Layout, count: int) -> list[Traffic]:
    """Within a data group, for `count` local numbers: DeepSpeed's reduction of gradients and gathering of weights.

    Calls are those of whole passes over the numbers; DeepSpeed cuts each in buckets.
    """
    if layout.data == 1:
        return []
    m, gradients = layout.micro_batches, layout.reduced_width * count
    if layout.zero == 3:
        # Once in the forward pass and, for what was not kept, in the backward pass; reduced after each micro-batch.
        numbers = gathered(config.model, layout).numbers
        return [
            Traffic("data", "all_gather", m * (1 + (numbers > count)), m * layout.width * numbers, layout.data),
            Traffic("data", "reduce_scatter", m, m * gradients, layout.data),
        ]
    passes = m if layout.zero == 2 else 1
    found = [Traffic("data", "all_reduce", passes, passes * gradients, layout.data)]
    if layout.zero:
        found.append(Traffic("data", "all_gather", 1, layout.width * count, layout.data))
    return found


def pipeline_traffic(config: Config, layout: Layout, stage: int) -> list[Traffic]:
    """Between stages: activations on, their gradients back, and once a step the gradient of a tied table."""
    if layout.pipeline == 1:
        return []
    model, m = config.model, layout.micro_batches
    hidden = layout.micro_batch * model.sequence_length * model.hidden_size * layout.width // layout.shards
    meta = layout.micro_batch * (1 + 2 * model.sequence_length) * 8
    on, back = stage < layout.pipeline - 1, stage > 0
    found = [Traffic("pipeline", "send", m * (on + back), m * (on * (hidden + meta) + back * hidden), 2)]
    if model.tied and stage in (0, layout.pipeline - 1):
        table = table_rows(model) // layout.tensor * model.hidden_size * layout.gradient_width
        found.append(Traffic("pipeline", "all_reduce", 1, table, 2))
    return found


def step_traffic(config: Config, layout: Layout, stage: int, count: int) -> list[Traffic]:
    """All communication of a step on a rank of a stage that holds `count` numbers."""
    parts = (
        tensor_traffic(config, layout, stage),
        data_traffic(config, layout, count),
        pipeline_traffic(config, layout, stage),
    )
    return [item for part in parts for item in part]
