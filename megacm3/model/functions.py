"""RMSNorm and SwiGLU that keep only their input for the backward pass, in few passes over memory.

torch's own RMSNorm is one kernel on CUDA; elsewhere it is composed of several, which keep the normalised values too.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        normed, grad = x * scale, grad.float()
        grad_weight = (grad * normed).sum(dim=list(range(x.dim() - weight.dim())))
        grad = grad * weight
        mean = (grad * normed).mean(dim=-1, keepdim=True)
        grad_x = grad.addcmul_(normed, mean, value=-1.0).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 inside.

    weight: [D], or with further leading dimensions that match those of x, such as [A, D] for x [..., A, D].
    """
    if x.is_cuda and weight.dim() == 1:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return _RmsNorm.apply(x, weight, eps)  # type: ignore[no-any-return,no-untyped-call]


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inner)
        gate, up = inner.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (inner,) = ctx.saved_tensors
        gate, up = inner.chunk(2, dim=-1)
        out = torch.empty_like(inner)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out


def swiglu(inner: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of the last dimension."""
    return _SwiGlu.apply(inner)  # type: ignore[no-any-return,no-untyped-call]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + D/2) of the last dimension by angles given as cos and sin of [..., D]."""
    low, high = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-high, low), dim=-1) * sin).to(x.dtype)
