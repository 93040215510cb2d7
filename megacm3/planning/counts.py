"""Parameters and FLOPs of a model. Pure functions.

A "number" is one element of a tensor, a "token" one position of one sequence; a test holds FLOPs to torch's counter.
"""

import math
from dataclasses import dataclass

from megacm3.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]


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
