"""Which module a non-finite number comes from: the step once more, with hooks, and without an update."""

from typing import Any

import torch
import torch.distributed as dist

from megacm3.parallel.engine import Engine
from megacm3.parallel.parts import parts_of


class _Watch:
    """Hooks on a rank's modules and parameters that remember the first non-finite output and gradient."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.count = 0
        self.forward: tuple[int, str] | None = None
        self.backward: tuple[int, str] | None = None
        self.handles = [
            part.register_forward_hook(self._seen(name, part)) for name, part in module.named_modules() if name
        ]
        self.handles += [p.register_hook(self._gradient(p)) for p in module.parameters() if p.requires_grad]

    def _seen(self, name: str, part: torch.nn.Module) -> Any:
        def hook(_: torch.nn.Module, inputs: Any, outputs: Any) -> None:
            self.count += 1
            if not self.forward and not _finite(outputs):
                self.forward = (self.count, f"the output of module {name} ({type(part).__name__})")

        return hook

    def _gradient(self, parameter: torch.nn.Parameter) -> Any:
        def hook(gradient: torch.Tensor) -> None:
            self.count += 1
            if not self.backward and not bool(torch.isfinite(gradient).all()):
                names = ", ".join(part.name for part in parts_of(parameter))
                self.backward = (self.count, f"the gradient of {names}")

        return hook


def _finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        # Detached: recomputation must save the same tensors with and without this look.
        return not value.is_floating_point() or bool(torch.isfinite(value.detach()).all())
    return all(_finite(item) for item in value) if isinstance(value, tuple | list) else True


def find_culprit(engine: Engine, micro_batches: list[dict[str, torch.Tensor]]) -> str:
    """Words for where the first non-finite number of a refused step appears. Collective; no parameter changes.

    Forward passes come before backward passes, earlier stages before later ones in the first and after them in the
    second, and among the ranks of a stage the one that met it earliest.
    """
    context = engine.context
    watch = _Watch(engine.module)
    try:
        engine.train_step(micro_batches, rehearse=True)
    finally:
        for handle in watch.handles:
            handle.remove()
    mine: Any = None
    if watch.forward:
        mine = (0, context.pipeline_rank, *watch.forward, context.rank)
    elif watch.backward:
        mine = (1, -context.pipeline_rank, *watch.backward, context.rank)
    found: list[Any] = [None] * context.world
    dist.all_gather_object(found, mine, group=context.control_group)
    bad = sorted((entry for entry in found if entry is not None), key=lambda entry: (*entry[:3], entry[4]))
    if not bad:
        return "a second pass over the same batch was finite: suspect a device"
    _, _, _, what, rank = bad[0]
    return f"first not finite: {what} on rank {rank}"
