"""Vocab-parallel cross entropy with z-loss, in chunks of tokens: [tokens, vocabulary] logits never exist whole.

The gradient is computed with the forward pass, chunk by chunk, so that nothing of a chunk is kept and, under ZeRO-3,
the weight is needed only once. With TP, softmax statistics are reduced over the tensor ranks in fp32.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

CHUNK = 1024
"""Tokens of a chunk. At 65,536 ids in fp32 a chunk is 256 MB over all tensor ranks."""
CPU_CHUNK = 256
"""The same on a CPU, where 256 to 1,024 tokens are equally fast (measured on 2 cores). On a GPU the sum of the table's
gradient passes through memory once a chunk, so that fewer are better."""

IGNORE = -100
"""Target without loss."""

POSITION_BUCKETS = 8
"""Equal parts of the sequence over which losses are also summed apart."""
SUMS = 8 + 2 * POSITION_BUCKETS
"""Numbers that a micro-batch adds to `LossState.sums`."""


@dataclass
class LossState:
    """Per-step numbers that pass between the loop and the head."""

    scale: float = 1.0
    """Factor of the sum of the token losses: data ranks / targets of the step; in a pipeline x micro-batches."""
    sums: torch.Tensor | None = None
    """fp64 [SUMS] over the micro-batches: nll, logZ^2, logZ, targets, text nll, text targets, image nll, image targets;
    then nll and targets of each bucket of positions."""
    output_norm: list[torch.Tensor] = field(default_factory=list)
    """Root mean square of the last layer's output, one a micro-batch."""
    target_logits: list[torch.Tensor] | None = None
    """Where there is a list, the logits of each micro-batch's targets are added: fp64 [T x B], positions first."""


class _ChunkedLoss(torch.autograd.Function):
    """(hidden [N, H], weight [V/TP, H]) -> sum over targets of nll + z * logZ^2, times scale."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, plan: "_Plan") -> Any:
        wide = torch.float32 if weight.dtype != torch.float64 else torch.float64
        nll = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        log_z = torch.empty_like(nll)
        grad_hidden = torch.empty_like(hidden) if plan.gradient else None
        grad_weight = None
        # One buffer for all chunks: on a CPU each new one would cost more in page faults than its arithmetic.
        chunk = CPU_CHUNK if hidden.is_cpu else CHUNK
        buffer = hidden.new_empty(min(chunk, hidden.shape[0]), weight.shape[0])
        for low in range(0, hidden.shape[0], chunk):
            rows = slice(low, low + chunk)
            logits = torch.mm(hidden[rows], weight.T, out=buffer[: hidden[rows].shape[0]])
            grad = _softmax(logits.to(wide), targets[rows], plan, nll[rows], log_z[rows])
            if grad_hidden is not None:
                grad = logits.copy_(grad)
                torch.mm(grad, weight, out=grad_hidden[rows])
                if plan.weight_gradient:
                    grad_weight = _add_product(grad_weight, grad, hidden[rows], wide)
        total = torch.where(targets != IGNORE, nll + plan.z_loss * log_z.square(), 0.0).sum() * plan.scale
        ctx.gradients = (grad_hidden, grad_weight, weight.dtype)
        ctx.mark_non_differentiable(nll, log_z)
        return total, nll, log_z

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        # In place: the gradients were made for this one call, and the table's is among the largest tensors there are.
        grad_hidden, grad_weight, dtype = ctx.gradients
        ctx.gradients = None
        # The engine asks for no factor; elsewhere than on the CPU, looking would wait for the device.
        if not grad.is_cpu or float(grad) != 1.0:
            grad_hidden = grad_hidden.mul_(grad)
            grad_weight = None if grad_weight is None else grad_weight.mul_(grad)
        return grad_hidden, None if grad_weight is None else grad_weight.to(dtype), None, None


@dataclass(frozen=True)
class _Plan:
    group: Any
    world: int
    rank: int
    vocab_size: int
    z_loss: float
    scale: float
    gradient: bool
    weight_gradient: bool
    """Not for a frozen table."""


def _add_product(
    total: torch.Tensor | None, grad: torch.Tensor, hidden: torch.Tensor, wide: torch.dtype
) -> torch.Tensor:
    """total + grad^T hidden, the sum over chunks in `wide`."""
    if total is None:
        return (grad.T @ hidden).to(wide)
    return total.addmm_(grad.T, hidden) if grad.dtype == wide else total.add_(grad.T @ hidden)


def _softmax(
    logits: torch.Tensor, targets: torch.Tensor, plan: _Plan, nll: torch.Tensor, log_z: torch.Tensor
) -> torch.Tensor:
    """Fill nll and log_z of a chunk; turn its logits, in place, into the loss's gradient by them (if one is wanted)."""
    width, first = logits.shape[1], plan.rank * logits.shape[1]
    if first + width > plan.vocab_size:  # padded rows of the table never count
        logits[:, max(0, plan.vocab_size - first) :] = -torch.inf
    top = logits.amax(dim=1)
    if plan.world > 1:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=plan.group)
    local = targets - first
    mine = (local >= 0) & (local < width)
    local = local.clamp(0, width - 1)
    picked = torch.where(mine, logits.gather(1, local[:, None])[:, 0] - top, 0.0)
    exp = logits.sub_(top[:, None]).exp_()
    sums = torch.stack((exp.sum(dim=1), picked))
    if plan.world > 1:
        dist.all_reduce(sums, group=plan.group)
    log_sum = sums[0].log()
    nll.copy_(log_sum - sums[1])
    log_z.copy_(log_sum + top)
    if plan.gradient:
        # d(nll + z logZ^2)/dlogit = softmax * (1 + 2 z logZ) - onehot, over real targets only
        real = (targets != IGNORE).to(exp.dtype) * plan.scale
        exp.mul_(((1.0 + 2.0 * plan.z_loss * log_z) * real / sums[0])[:, None])
        exp.scatter_add_(1, local[:, None], (-real * mine)[:, None])
    return exp


def chunked_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int,
    z_loss: float = 0.0,
    scale: float = 1.0,
    group: Any = None,
    world: int = 1,
    rank: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross entropy of hidden [N, H] against targets int64 [N] (IGNORE = none).

    Returns (scaled total with gradient, nll [N], logZ [N]); nll and logZ are meaningless where there is no target. The
    z-loss is z * logZ^2 over the same targets (Chameleon 2.3). With world > 1, `weight` holds this rank's rows.
    """
    gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    plan = _Plan(group, world, rank, vocab_size, z_loss, scale, gradient, gradient and weight.requires_grad)
    return _ChunkedLoss.apply(hidden, weight, targets, plan)  # type: ignore[no-any-return,no-untyped-call]
