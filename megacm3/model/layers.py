"""Norms, rotary positions, dropout, attention and feed-forward on megatron-core's parallel linear layers.

Shapes: S positions (of this rank, under sequence parallel), T all positions, B batch, H hidden, A heads, K key/value
heads (of this rank), D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch.utils.checkpoint import checkpoint

from megacm3.command import seed_from
from megacm3.config import Config, ModelConfig
from megacm3.model.functions import rms_norm
from megacm3.model.kernels import PLAIN, Kernels, elementwise, fused_attention, norms
from megacm3.model.lora import ColumnLora, RowLora, targets
from megacm3.parallel import parts
from megacm3.parallel.context import ParallelContext
from megacm3.parallel.replicated import summed_over_tensor_ranks


def linear_config(config: Config, context: ParallelContext, dtype: torch.dtype) -> ModelParallelConfig:
    """What megatron-core's linear layers read. Initialisation is ours (model/init.py), so theirs is off."""
    return ModelParallelConfig(
        tensor_model_parallel_size=context.tensor,
        sequence_parallel=context.sequence,
        params_dtype=dtype,
        use_cpu_initialization=context.device.type != "cuda",
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        pipeline_dtype=dtype,
    )


def _unused_init(weight: torch.Tensor) -> torch.Tensor:
    return weight


class Norm(torch.nn.Module):
    """Parameter-free LayerNorm (CM3Leon 2.3) or RMSNorm with weight (Chameleon 2.3), over the last dimension."""

    def __init__(
        self, name: str, model: ModelConfig, context: ParallelContext, dtype: torch.dtype, kernels: Kernels = PLAIN
    ) -> None:
        super().__init__()
        self.eps, self.context = model.norm_eps, context
        self._rms_norm, self._layer_norm = norms(kernels)
        self.weight = None
        if model.norm == "rmsnorm":
            self.weight = torch.nn.Parameter(torch.empty(model.hidden_size, dtype=dtype, device=context.device))
            parts.attach(self.weight, [parts.whole(f"{name}.weight", (model.hidden_size,))], split=False)

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """[S, B, H] -> [S, B, H]."""
        if self.weight is None:
            return self._layer_norm(x_SBH, self.eps)
        weight = summed_over_tensor_ranks(self.weight, self.context) if self.context.sequence else self.weight
        return self._rms_norm(x_SBH, weight, self.eps)


class HeadNorm(torch.nn.Module):
    """q or k norm over each head: LayerNorm with weight and bias (Chameleon's released code) or RMSNorm.

    Parameters are [groups, D], replicated on all tensor ranks; heads // groups consecutive heads share a row.
    """

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter
    rows: torch.Tensor | None

    def __init__(self, name: str, heads: int, model: ModelConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.context, self.eps, self.rms = context, model.norm_eps, model.qk_norm == "rmsnorm"
        size, groups = model.hidden_size // model.heads, min(model.qk_norm_groups, heads)
        local = heads // context.tensor
        first = context.tensor_rank * local
        # Row of the parameter for each head of this rank.
        rows = torch.tensor([head * groups // heads for head in range(first, first + local)], device=context.device)
        self.register_buffer("rows", rows if groups > 1 else None, persistent=False)
        for kind in ("weight",) if self.rms else ("weight", "bias"):
            parameter = torch.nn.Parameter(torch.empty(groups, size, dtype=dtype, device=context.device))
            parts.attach(parameter, [parts.whole(f"{name}.{kind}", (groups, size))], split=False)
            self.register_parameter(kind, parameter)

    def _per_head(self, parameter: torch.Tensor) -> torch.Tensor:
        parameter = summed_over_tensor_ranks(parameter, self.context)
        return parameter[0] if self.rows is None else parameter.index_select(0, self.rows)

    def forward(self, x_SBAD: torch.Tensor) -> torch.Tensor:
        """[S, B, A, D] -> [S, B, A, D]."""
        weight = self._per_head(self.weight)
        if self.rms:
            return rms_norm(x_SBAD, weight, self.eps)
        bias = self._per_head(self.bias)
        if self.rows is None:
            return F.layer_norm(x_SBAD, x_SBAD.shape[-1:], weight, bias, self.eps)
        return F.layer_norm(x_SBAD, x_SBAD.shape[-1:], eps=self.eps) * weight + bias


class Rotary(torch.nn.Module):
    """Rotary positions in half-split form: pairs are (i, i + D/2)."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, model: ModelConfig, device: torch.device, kernels: Kernels = PLAIN) -> None:
        super().__init__()
        self._rotate = elementwise(kernels)[1]
        size = model.hidden_size // model.heads
        frequency = model.rope_theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        angle = torch.outer(torch.arange(model.sequence_length, dtype=torch.float64), frequency)
        angle = torch.cat((angle, angle), dim=-1)
        self.register_buffer("cos", angle.cos().float().to(device), persistent=False)
        self.register_buffer("sin", angle.sin().float().to(device), persistent=False)

    def forward(self, x_TBAD: torch.Tensor, positions_BT: torch.Tensor | None) -> torch.Tensor:
        """Rotate by position 0..T-1, or by `positions_BT` where positions start again at each document."""
        if positions_BT is None:
            cos, sin = (table[: x_TBAD.shape[0], None, None] for table in (self.cos, self.sin))
        else:
            cos, sin = (table[positions_BT.T][:, :, None] for table in (self.cos, self.sin))
        return self._rotate(x_TBAD, cos, sin)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """A bijective 32-bit hash (xorshift-multiply) on int32, with logical shifts."""
    for multiplier in (0x7FEB352D, 0x846CA68B - (1 << 32)):
        x = (x ^ ((x >> 16) & 0xFFFF)) * multiplier
        x = x ^ ((x >> 15) & 0x1FFFF)
    return x


class KeyedDropout(torch.nn.Module):
    """Dropout whose mask is a hash of (seed, place in the network, sequence number, position, channel).

    No generator state: a resumed run, a recomputed block and any layout see the same masks. Each element is kept with
    probability 1 - p and scaled by 1 / (1 - p).
    """

    def __init__(self, p: float, place: str, seed: int, context: ParallelContext) -> None:
        super().__init__()
        self.p, self.context = p, context
        self.key = seed_from("dropout", seed, place) & 0x7FFFFFFF

    def mask(self, numbers_B: torch.Tensor, length: int, width: int) -> torch.Tensor:
        """bool [length, B, width]: what is kept, for `length` positions of this rank."""
        first = self.context.tensor_rank * length if self.context.sequence else 0
        device = numbers_B.device
        row_B = _mix32(_mix32((numbers_B >> 31).int() ^ self.key) ^ (numbers_B & 0x7FFFFFFF).int())
        position = torch.arange(first, first + length, device=device, dtype=torch.int32)
        row_SB = _mix32(position[:, None] ^ row_B[None])
        channel = torch.arange(width, device=device, dtype=torch.int32) * 0x632BE5AB
        threshold = int((self.p - 0.5) * 2**32)
        return _mix32(row_SB[:, :, None] ^ channel) >= threshold

    def forward(self, x_SBH: torch.Tensor, numbers_B: torch.Tensor) -> torch.Tensor:
        """[S, B, H] and the sequence numbers int64 [B] -> [S, B, H]."""
        if self.p == 0.0 or not self.training:
            return x_SBH
        kept = self.mask(numbers_B, x_SBH.shape[0], x_SBH.shape[2])
        return torch.where(kept, x_SBH * (1.0 / (1.0 - self.p)), 0.0)


class Attention(torch.nn.Module):
    """Causal self-attention: fused q, k, v projection, optional q/k norm before RoPE, output projection."""

    def __init__(
        self, name: str, config: Config, context: ParallelContext, linear: Any, kernels: Kernels = PLAIN
    ) -> None:
        super().__init__()
        model, world, rank = config.model, context.tensor, context.tensor_rank
        self.recompute = config.parallel.recompute == "selective"
        self.size = model.hidden_size // model.heads
        self.heads, self.kv_heads = model.heads // world, model.kv_heads // world
        self.fused = fused_attention(kernels, self.heads, self.kv_heads, self.size)
        hidden, q_rows, kv_rows = model.hidden_size, model.heads * self.size, model.kv_heads * self.size
        common = {"config": linear, "bias": False, "init_method": _unused_init, "tp_group": context.tensor_group}
        self.qkv = ColumnParallelLinear(hidden, q_rows + 2 * kv_rows, gather_output=False, **common)
        q, k = q_rows // world, kv_rows // world
        pieces = [
            parts.rows(f"{name}.q.weight", (q_rows, hidden), rank, world, 0),
            parts.rows(f"{name}.k.weight", (kv_rows, hidden), rank, world, q),
            parts.rows(f"{name}.v.weight", (kv_rows, hidden), rank, world, q + k),
        ]
        parts.attach(self.qkv.weight, pieces, split=world > 1)
        self.o = RowParallelLinear(q_rows, hidden, input_is_parallel=True, skip_bias_add=False, **common)
        parts.attach(self.o.weight, [parts.columns(f"{name}.o.weight", (hidden, q_rows), rank, world)], split=world > 1)
        self.q_norm = self.k_norm = self.qkv_lora = self.o_lora = None
        dtype, fused = linear.params_dtype, {"q": q_rows, "k": kv_rows, "v": kv_rows}
        if targets(config, list(fused)):
            self.qkv_lora = ColumnLora(name, hidden, fused, config, context, dtype)
        if targets(config, ["o"]):
            self.o_lora = RowLora(f"{name}.o", q_rows, hidden, config, context, dtype)
        if model.qk_norm != "none":
            self.q_norm = HeadNorm(f"{name}.q_norm", model.heads, model, context, dtype)
            self.k_norm = HeadNorm(f"{name}.k_norm", model.kv_heads, model, context, dtype)

    def _heads(
        self, qkv: torch.Tensor, rotary: Rotary | None, mask: torch.Tensor | None, positions_BT: torch.Tensor | None
    ) -> torch.Tensor:
        length, batch = qkv.shape[:2]
        widths = [self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size]
        q, k, v = (t.view(length, batch, -1, self.size) for t in qkv.split(widths, dim=-1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotary(q, positions_BT), rotary(k, positions_BT)
        if self.fused is not None:
            return self.fused(q, k, v)  # type: ignore[no-any-return]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        grouped = self.kv_heads != self.heads
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).flatten(2)

    def forward(
        self, x_SBH: torch.Tensor, rotary: Rotary | None, mask: torch.Tensor | None, positions_BT: torch.Tensor | None
    ) -> torch.Tensor:
        """[S, B, H] -> [S, B, H]; `mask` bool [B, 1, T, T] where documents hide one another, else None (causal)."""
        qkv, _ = self.qkv(x_SBH)
        if self.qkv_lora is not None:
            qkv = qkv + self.qkv_lora(x_SBH)
        if self.recompute and torch.is_grad_enabled():
            arguments = (qkv, rotary, mask, positions_BT)
            out = checkpoint(self._heads, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self._heads(qkv, rotary, mask, positions_BT)
        x_SBH = self.o(out)[0]
        return x_SBH if self.o_lora is None else x_SBH + self.o_lora(out)


class FeedForward(torch.nn.Module):
    """ReLU (CM3Leon, inferred) or SwiGLU (Chameleon 2.3) feed-forward; gate and up are one fused matrix."""

    def __init__(
        self, name: str, config: Config, context: ParallelContext, linear: Any, kernels: Kernels = PLAIN
    ) -> None:
        super().__init__()
        model, world, rank = config.model, context.tensor, context.tensor_rank
        self.gated = model.activation == "swiglu"
        self._swiglu = elementwise(kernels)[0]
        hidden, ffn = model.hidden_size, model.ffn_size
        common = {"config": linear, "bias": False, "init_method": _unused_init, "tp_group": context.tensor_group}
        self.up = ColumnParallelLinear(hidden, ffn * (2 if self.gated else 1), gather_output=False, **common)
        names = ["gate", "up"] if self.gated else ["up"]
        pieces = [
            parts.rows(f"{name}.{kind}.weight", (ffn, hidden), rank, world, i * ffn // world)
            for i, kind in enumerate(names)
        ]
        parts.attach(self.up.weight, pieces, split=world > 1)
        self.down = RowParallelLinear(ffn, hidden, input_is_parallel=True, skip_bias_add=False, **common)
        parts.attach(
            self.down.weight, [parts.columns(f"{name}.down.weight", (hidden, ffn), rank, world)], split=world > 1
        )
        self.up_lora = self.down_lora = None
        if targets(config, names):
            self.up_lora = ColumnLora(name, hidden, dict.fromkeys(names, ffn), config, context, linear.params_dtype)
        if targets(config, ["down"]):
            self.down_lora = RowLora(f"{name}.down", ffn, hidden, config, context, linear.params_dtype)

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """[S, B, H] -> [S, B, H]."""
        inner, _ = self.up(x_SBH)
        if self.up_lora is not None:
            inner = inner + self.up_lora(x_SBH)
        if self.gated:
            inner = self._swiglu(inner)
        else:
            inner = F.relu(inner)
        x_SBH = self.down(inner)[0]
        return x_SBH if self.down_lora is None else x_SBH + self.down_lora(inner)
