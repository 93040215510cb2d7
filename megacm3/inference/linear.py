"""Matrix products of the decoder: plain, or with int8 weights (a quarter of fp32's memory traffic on a CPU).

R rows, N outputs, K inputs.
"""

import torch
import torch.nn.functional as F

from megacm3.errors import ConfigError


class Int8Weight:
    """A weight [N, K] as int8 with one scale a row; the product rounds its input to bf16."""

    def __init__(self, weight: torch.Tensor):
        """Raises ConfigError on a device other than a CPU."""
        if weight.device.type != "cpu":
            raise ConfigError(f"int8 weights run on the CPU only; found {weight.device}: leave out --int8")
        # The largest value of a row becomes 127; -128 is not used.
        scale = (weight.float().abs().amax(1) / 127).clamp_min(1e-12)
        self.values = (weight.float() / scale[:, None]).round().to(torch.int8)
        self.scale = scale
        # The kernel's scales have the input's dtype; ones lose nothing, and the true scales follow in fp32.
        self._ones = torch.ones(len(scale), dtype=torch.bfloat16)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N] of x's dtype."""
        flat = x.reshape(-1, x.shape[-1]).bfloat16()
        out = torch._weight_int8pack_mm(flat, self.values, self._ones)
        return (out.float() * self.scale).to(x.dtype).view(*x.shape[:-1], -1)


Weight = torch.Tensor | Int8Weight


FEW_ROWS = range(4, 65)
"""Rows for which a CPU's fp32 product is faster with the weight on the left (measured: 8 rows in 1.9 times the time of
one, against 2.5; up to 3 and from 128 rows on there is no gain)."""


def linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """x [..., K] -> [..., N]"""
    if isinstance(weight, Int8Weight):
        return weight(x)
    rows = x.numel() // x.shape[-1]
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        if rows == 1:
            return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
        if rows in FEW_ROWS:
            return (weight @ x.reshape(rows, -1).t()).t().reshape(*x.shape[:-1], -1)
    return F.linear(x, weight)
