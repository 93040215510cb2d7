"""The optimizer that a DeepSpeed engine drives, and what must be put right around it."""

from typing import Any

import torch
import torch.distributed as dist

from megacm3.config import Config
from megacm3.parallel.context import ParallelContext
from megacm3.parallel.parts import parts_of

_PIECE = 1 << 16
"""Numbers whose squares are summed in fp32, to 1e-7; over a whole table fp32 loses the third digit."""


def _square_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of squares in fp64, without a copy of the tensor in fp64."""
    norms = torch._foreach_norm(tensor.detach().reshape(-1).split(_PIECE), dtype=torch.float32)
    return torch.stack(norms).double().square().sum()


class _ClippedSteps:
    """Global norm and clipping inside `optimizer.step`, where ZeRO does not do it (stage 0).

    Replicated parameters count once over the tensor ranks, a tied table once over the stages. DeepSpeed itself counts
    the table twice, and in bf16 each tensor rank would clip by the norm of its own share.
    """

    context: ParallelContext | None = None
    """Set once the engine stands; DeepSpeed's own first step with zero gradients comes before."""
    clip = 0.0
    grad_norm = 0.0
    """Of the last step, before clipping; equal on all ranks."""

    def step(self, closure: Any = None) -> Any:
        if self.context is not None:
            self._clip_all(self.context)
        return super().step(closure)  # type: ignore[misc]

    def _clip_all(self, context: ParallelContext) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]  # type: ignore[attr-defined]
        total = torch.zeros((), dtype=torch.float64, device=context.device)
        for p in parameters:
            counted = p.tensor_model_parallel or context.tensor_rank == 0
            tied_copy = context.pipeline > 1 and context.is_last_stage and parts_of(p)[0].name == "embed.weight"
            if counted and not tied_copy:
                total += _square_sum(p.grad)
        if context.tensor * context.pipeline > 1:
            dist.all_reduce(total, group=context.model_group)
        self.grad_norm = float(total.sqrt())
        if self.clip and self.grad_norm > self.clip:
            torch._foreach_mul_([p.grad for p in parameters], self.clip / (self.grad_norm + 1e-6))


class _ClippedAdamW(_ClippedSteps, torch.optim.AdamW):
    pass


class _ClippedSGD(_ClippedSteps, torch.optim.SGD):
    pass


def parameter_groups(config: Config, module: torch.nn.Module) -> list[dict[str, Any]]:
    """Parameters with and without weight decay: none on norm gains (common practice; the papers give one number)."""
    decayed = [p for p in module.parameters() if p.requires_grad and "norm" not in parts_of(p)[0].name]
    plain = [p for p in module.parameters() if p.requires_grad and "norm" in parts_of(p)[0].name]
    groups = [
        {"params": decayed, "weight_decay": config.optimizer.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(config: Config, module: torch.nn.Module, own_clip: bool) -> Any:
    """AdamW (torch's fused kernel; model/kernels.py says why) or SGD over the module's parameters.

    own_clip: make one that can clip by itself; `start_clipping` turns that on once the engine stands.
    """
    groups, settings = parameter_groups(config, module), config.optimizer
    if settings.kind == "sgd":
        return (_ClippedSGD if own_clip else torch.optim.SGD)(groups, lr=settings.lr)
    return (_ClippedAdamW if own_clip else torch.optim.AdamW)(
        groups, lr=settings.lr, betas=(settings.betas[0], settings.betas[1]), eps=settings.eps, fused=True
    )


def start_clipping(optimizer: Any, context: ParallelContext, clip: float) -> None:
    """From here on each step clips; `optimizer` is what `deepspeed.initialize` made of ours."""
    if hasattr(optimizer, "fp32_groups"):
        _mend_masters(optimizer)
        optimizer = optimizer.optimizer
    optimizer.context, optimizer.clip = context, clip


@torch.no_grad()
def _mend_masters(wrapper: Any) -> None:
    """Put right what DeepSpeed's wrapper for bf16 without ZeRO does when it is built.

    It makes one step with zero gradients, which decays the weights once and counts in Adam's bias correction, so that
    the first updates would be a quarter too small; and its fp32 copies lose the marks of the parameters.
    """
    wrapper.optimizer.state.clear()
    for group, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
        for parameter, master in zip(group, masters, strict=True):
            master.copy_(parameter)
            master.parts = parts_of(parameter)
            master.tensor_model_parallel = parameter.tensor_model_parallel
