"""A plain-torch decoder with a preallocated key/value cache: one pass over all rows of a step.

Shape letters: R rows, T tokens of this call, H hidden, A query heads, K key/value heads, d head size, S cache slots,
V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from megacm3.inference.linear import Int8Weight, linear
from megacm3.inference.weights import Architecture, Layer, Weights, read_folder
from megacm3.tokenizers.image import torch_device


@dataclass
class Cache:
    """Keys and values of every row, [layers, rows, K, S + 1, d]; slot S takes what padding writes and is never read."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.keys.shape[1]

    @property
    def slots(self) -> int:
        """Positions that a row can hold."""
        return self.keys.shape[3] - 1

    def copy_row(self, source: "Cache", source_row: int, row: int, length: int) -> None:
        """Copy the first `length` positions of `source`'s row into `row`."""
        self.keys[:, row, :, :length] = source.keys[:, source_row, :, :length]
        self.values[:, row, :, :length] = source.values[:, source_row, :, :length]


class Decoder:
    """A model of an exported folder, for inference only.

    A row's result does not depend on the other rows but for the rounding of matrix products of another shape.
    """

    def __init__(self, architecture: Architecture, weights: Weights):
        self.architecture, self.weights = architecture, weights
        self.device, self.dtype = weights.embed.device, weights.embed.dtype
        self._rotary = _rotary_table(architecture, self.device) if architecture.rope_theta is not None else None

    @staticmethod
    def load(
        folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, int8: bool = False
    ) -> "Decoder":
        """Read an exported folder; `int8` rounds the blocks' matrices (not embedding and head).

        Raises CheckpointError (folder) or ConfigError (device).
        """
        architecture, weights = read_folder(folder, torch_device(device), dtype)
        for layer in weights.layers if int8 else ():
            for name in ("qkv", "out", "up", "down"):
                setattr(layer, name, Int8Weight(getattr(layer, name)))
        return Decoder(architecture, weights)

    def cache(self, rows: int, slots: int) -> Cache:
        """An empty cache for `rows` sequences of at most `slots` positions."""
        a = self.architecture
        shape = (a.layers, rows, a.kv_heads, slots + 1, a.head_dim)
        # Zeros, since a masked slot's value times weight 0 must not be NaN.
        keys = torch.zeros(shape, device=self.device, dtype=self.dtype)
        return Cache(keys, torch.zeros_like(keys))

    @torch.inference_mode()
    def forward(
        self,
        tokens_RT: torch.Tensor,
        starts: Sequence[int],
        cache: Cache,
        first_row: int = 0,
        counts: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Run tokens through the model; rows `first_row` .. `first_row + R` of `cache` hold what came before.

        tokens_RT int64; `starts` is the position of each row's first token; `counts` the number of real tokens of each
        row (the rest is padding on the right). Returns hidden_RTH after the final norm (padding rows: any values).
        """
        rows, width = tokens_RT.shape
        plan = _Plan(starts, counts or [width] * rows, width, cache, first_row, self.device)
        x = F.embedding(tokens_RT, self.weights.embed)
        if self.weights.positions is not None:
            x = x + F.embedding(plan.positions.clamp(max=len(self.weights.positions) - 1), self.weights.positions)
        rotary = None
        if self._rotary is not None:
            at = plan.positions.clamp(max=self._rotary.shape[1] - 1)
            rotary = self._rotary[:, at].unsqueeze(2).to(x.dtype)  # [2, R|1, 1, T, d]
        for i, layer in enumerate(self.weights.layers):
            if self.architecture.swin:
                x = x + self._norm(self._attend(x, layer, i, plan, rotary), layer.attn_norm)
                x = x + self._norm(self._feed_forward(x, layer), layer.mlp_norm)
            else:
                x = x + self._attend(self._norm(x, layer.attn_norm), layer, i, plan, rotary)
                x = x + self._feed_forward(self._norm(x, layer.mlp_norm), layer)
        return self._norm(x, self.weights.final_norm)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, head: torch.Tensor | None = None) -> torch.Tensor:
        """fp32 logits of hidden [..., H] over the vocabulary, or over the rows of `head` (see `head_of`)."""
        return linear(hidden, self.weights.head if head is None else head).float()

    def head_of(self, ids: torch.Tensor) -> torch.Tensor:
        """The output rows of `ids` [n], a view where the ids are consecutive: less to read than the whole table."""
        first, count = int(ids[0]), len(ids)
        if bool((ids == torch.arange(first, first + count, device=ids.device)).all()):
            return self.weights.head[first : first + count]
        return self.weights.head[ids.to(self.device)]

    def _norm(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        a = self.architecture
        if a.norm == "layernorm":
            return F.layer_norm(x, (a.hidden_size,), eps=a.norm_eps)
        return F.rms_norm(x, (a.hidden_size,), weight, a.norm_eps)

    def _feed_forward(self, x: torch.Tensor, layer: Layer) -> torch.Tensor:
        up = linear(x, layer.up)
        if self.architecture.activation == "swiglu":
            gate, up = up.chunk(2, dim=-1)
            return linear(F.silu(gate) * up, layer.down)
        return linear(F.relu(up) if self.architecture.activation == "relu" else F.gelu(up), layer.down)

    def _attend(
        self, x: torch.Tensor, layer: Layer, index: int, plan: "_Plan", rotary: torch.Tensor | None
    ) -> torch.Tensor:
        a = self.architecture
        rows, width, _ = x.shape
        heads = linear(x, layer.qkv).view(rows, width, a.heads + 2 * a.kv_heads, a.head_dim)
        q, k, v = heads.split_with_sizes([a.heads, a.kv_heads, a.kv_heads], dim=2)
        q, k = self._head_norm(q, layer.q_norm), self._head_norm(k, layer.k_norm)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if rotary is not None:
            q, k = _rotate(q, rotary), _rotate(k, rotary)
        k, v = plan.store(index, k, v)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=plan.mask, is_causal=plan.causal, enable_gqa=a.heads != a.kv_heads
        )
        return linear(out.transpose(1, 2).reshape(rows, width, -1), layer.out)

    def _head_norm(self, x: torch.Tensor, parameters: tuple[torch.Tensor, torch.Tensor | None] | None) -> torch.Tensor:
        if parameters is None:
            return x
        weight, bias = parameters
        if bias is None:
            return F.rms_norm(x, (x.shape[-1],), weight, self.architecture.norm_eps)
        # Chameleon: statistics over one head, weight and bias of that head; eps 1e-5 whatever the blocks' norm has.
        return F.layer_norm(x, (x.shape[-1],), eps=1e-5) * weight + bias


class _Plan:
    """Where this call's tokens stand: positions, cache slots and what each may see; shared by all layers."""

    def __init__(
        self,
        starts: Sequence[int],
        counts: Sequence[int],
        width: int,
        cache: Cache,
        first_row: int,
        device: torch.device,
    ):
        rows, end = len(starts), max(s + c for s, c in zip(starts, counts, strict=True))
        assert len(counts) == rows and first_row + rows <= cache.rows and end <= cache.slots
        self.cache = cache
        # One view a layer of all that these rows hold, made once: cutting them out in each layer takes longer.
        held = slice(first_row, first_row + rows)
        self.keys, self.values = (side[:, held, :, :end].unbind() for side in (cache.keys, cache.values))
        offsets = torch.arange(width, device=device)
        self.uniform = min(starts) == max(starts) and min(counts) == width
        self.causal, self.mask = False, None
        if self.uniform:
            # All rows stand at one position: the cache is written by a slice, and a single token sees all of it.
            self.start = starts[0]
            self.positions = (offsets + self.start)[None]  # [1, T]
            new = slice(self.start, end)
            self.new_keys, self.new_values = (side[:, held, :, new].unbind() for side in (cache.keys, cache.values))
            self.causal = self.start == 0 and width > 1
            if self.start > 0 and width > 1:
                self.mask = torch.arange(end, device=device) <= self.positions[0, :, None]
            return
        first = torch.tensor(starts, device=device)[:, None]
        self.positions = first + offsets  # [R, T]
        real = offsets < torch.tensor(counts, device=device)[:, None]
        self.row_index = torch.arange(first_row, first_row + rows, device=device)[:, None]
        self.slot_index = torch.where(real, self.positions, cache.slots)
        self.mask = (torch.arange(end, device=device) <= self.positions[:, :, None])[:, None]  # [R, 1, T, end]

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v [R, K, T, d] into the cache; returns all that these rows hold, [R, K, end, d]."""
        if self.uniform:
            self.new_keys[layer].copy_(k)
            self.new_values[layer].copy_(v)
        else:
            self.cache.keys[layer][self.row_index, :, self.slot_index] = k.transpose(1, 2)
            self.cache.values[layer][self.row_index, :, self.slot_index] = v.transpose(1, 2)
        return self.keys[layer], self.values[layer]


def _rotary_table(a: Architecture, device: torch.device) -> torch.Tensor:
    """cos and sin of every position, [2, S, d], for the half-split ("NeoX") rotation that exports use."""
    assert a.rope_theta is not None
    steps = torch.arange(0, a.head_dim, 2, dtype=torch.float32, device=device) / a.head_dim
    angles = torch.arange(a.positions, dtype=torch.float32, device=device)[:, None] * a.rope_theta**-steps
    angles = torch.cat((angles, angles), dim=-1)
    return torch.stack((angles.cos(), angles.sin()))


def _rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * rotary[0] + torch.cat((-high, low), dim=-1) * rotary[1]
