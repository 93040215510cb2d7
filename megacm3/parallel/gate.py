"""What stands before the optimizer step: gradients are looked at, all ranks agree, and a refused step changes nothing.

DeepSpeed alone does not serve: a stage of a pipeline does not hear of the others, bf16 is not checked, and its norms
turn what is not finite into -1.
"""

from collections.abc import Callable
from typing import Any

import torch

SPIKE, NONFINITE = 1, 2
"""Why a step is refused; the higher one counts where ranks differ."""


def gradients(optimizer: Any, zero_stage: int) -> list[torch.Tensor]:
    """This rank's share of the reduced gradients, where a DeepSpeed optimizer holds it just before its step."""
    if zero_stage == 0:
        groups = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in optimizer.param_groups]
        return [p.grad for group in groups for p in group if p.grad is not None]
    if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):  # bf16 with ZeRO-1
        return list(optimizer.fp32_groups_gradient_flat_partition)
    if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
        if hasattr(optimizer, "_wait_for_offload_copies"):
            optimizer._wait_for_offload_copies()
        flats = optimizer.fp32_partitioned_groups_flat if zero_stage == 3 else optimizer.single_partition_of_fp32_groups
        return [flat.grad for flat in flats if flat.grad is not None]
    held = [grads for grads in optimizer.averaged_gradients.values() if grads is not None]
    return [gradient for grads in held for gradient in grads if gradient is not None]


def are_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether every number is finite; sums of squares that overflow count as not."""
    if not tensors:
        return True
    norms = torch._foreach_norm([tensor.detach() for tensor in tensors])
    return bool(torch.isfinite(torch.stack([norm.float() for norm in norms])).all())


class Gate:
    """Around the `step` of the optimizer that DeepSpeed drives, and of the torch optimizer inside it."""

    def __init__(self, optimizer: Any, zero_stage: int, is_refused: Callable[[bool], bool]) -> None:
        """is_refused: asked once a step, with whether this rank's gradients are finite."""
        self._optimizer, self._zero_stage, self._is_refused = optimizer, zero_stage, is_refused
        self._closed = False
        inner = getattr(optimizer, "optimizer", optimizer)
        self._inner_step = inner.step
        inner.step = self._update
        # Where DeepSpeed wraps the optimizer, its own step must run all the same: it clears the gradients.
        self._outer_step = inner.step if inner is optimizer else optimizer.step
        optimizer.step = self._ask

    def _ask(self, *arguments: Any, **more: Any) -> Any:
        self._closed = self._is_refused(are_finite(gradients(self._optimizer, self._zero_stage)))
        if self._closed and hasattr(self._optimizer, "clear_hp_grads"):
            # After a first step without an update, its own step would look for states that are not there.
            self._optimizer.clear_hp_grads()
            self._optimizer.clear_lp_grads()
            return None
        return self._outer_step(*arguments, **more)

    def _update(self, *arguments: Any, **more: Any) -> Any:
        return None if self._closed else self._inner_step(*arguments, **more)
