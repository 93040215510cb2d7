"""An engine's state as boxes of logical tensors, and back, for every ZeRO stage, with and without a pipeline.

Where a rank's share of an optimizer lies differs by stage (0: whole tensors; 1, 2: a slice of a flat group, with its
address in `_hp_mapping`; 3: an equal slice of every flattened parameter). `_slots` knows this; the rest sees `View`s: a
flat range of a local parameter, and the tensor that holds it.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megacm3.checkpoint.boxes import Box, boxes_of_range, row_width
from megacm3.checkpoint.pieces import MASTER, PARAM, Piece
from megacm3.checkpoint.reader import Weights
from megacm3.errors import CheckpointError, ConfigError
from megacm3.parallel.context import ParallelContext
from megacm3.parallel.engine import Engine
from megacm3.parallel.parts import Part, parts_of


@dataclass(frozen=True)
class View:
    """Elements [start, start + len(values)) of a flattened local parameter."""

    kind: str
    parts: tuple[Part, ...]
    width: int
    """Elements in a row of the local parameter."""
    start: int
    values: torch.Tensor
    """One dimension; the engine's own memory."""
    saved: bool
    """Whether this rank writes it: of several copies the lowest rank does."""

    def pieces(self) -> Iterator[Piece]:
        """The view cut into boxes of logical tensors."""
        for part in self.parts:
            for box, place in boxes_of_range(part, self.width, self.start, self.start + self.values.numel()):
                yield Piece(self.kind, part.name, part.global_shape, box, self.values[place].view(box.shape))


@dataclass(frozen=True)
class _Slot:
    """A rank's share of one parameter's optimizer state."""

    parameter: torch.nn.Parameter
    start: int
    own: torch.Tensor
    """The share of the parameter itself, one dimension."""
    master: torch.Tensor | None
    """The share of the copy that the optimizer updates; None where it updates the parameter itself."""
    key: torch.Tensor
    """What the optimizer's state is kept under."""
    at: int
    """Where the share begins in the state's flattened tensors."""


def _shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _trained(engine: Engine) -> list[torch.nn.Parameter]:
    return [p for p in engine.module.parameters() if p.requires_grad]


def base_optimizer(engine: Engine) -> Any:
    """The torch optimizer inside DeepSpeed's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _whole_slots(engine: Engine) -> list[_Slot]:
    wrapper = engine.optimizer
    masters: dict[int, torch.Tensor] = {}
    for low, high in zip(getattr(wrapper, "fp16_groups", ()), getattr(wrapper, "fp32_groups", ()), strict=True):
        masters |= {id(p): master for p, master in zip(low, high, strict=True)}
    slots = []
    for p in _trained(engine):
        master = masters.get(id(p))
        flat = None if master is None else master.data.view(-1)
        slots.append(_Slot(p, 0, p.data.view(-1), flat, p if master is None else master, 0))
    return slots


def _flat_group_slots(engine: Engine) -> list[_Slot]:
    for indices in getattr(engine.optimizer, "round_robin_bit16_indices", []):
        if list(indices) != sorted(indices):
            raise ConfigError("zero_optimization.round_robin_gradients = true cannot be saved; set it to false")
    groups, slots = base_optimizer(engine).param_groups, []
    for p in _trained(engine):
        mapping = p._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            continue
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        own = p.data.view(-1)[low.start : low.start + low.numel]
        (flat,) = groups[mapping.param_group_index]["params"]
        slots.append(_Slot(p, low.start, own, flat.data[high.start : high.start + high.numel], flat, high.start))
    return slots


def _partition(parameter: torch.nn.Parameter, context: ParallelContext) -> tuple[int, int]:
    """(first element, elements) of this rank's share of a ZeRO-3 parameter."""
    share = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
    start = share * context.data_rank
    return start, min(share, parameter.ds_numel - start)  # type: ignore[attr-defined]


def _partition_slots(engine: Engine) -> list[_Slot]:
    wrapper, slots = engine.optimizer, []
    if getattr(wrapper, "swap_optimizer", False) or getattr(wrapper, "params_in_nvme_and_cpu", False):
        raise ConfigError("a checkpoint cannot hold what ZeRO-3 offloads to nvme; offload to cpu in the DeepSpeed JSON")
    for p in _trained(engine):
        start, size = _partition(p, engine.context)
        if size <= 0:  # all of this rank's share is padding
            continue
        local = p.ds_tensor  # type: ignore[attr-defined]
        group, at, _ = wrapper.grad_position[wrapper.get_param_id(p)]
        flat = wrapper.fp32_partitioned_groups_flat[group]
        slots.append(_Slot(p, start, local.data[:size], flat.data[at : at + size], flat, at))
    return slots


def _slots(engine: Engine) -> list[_Slot]:
    if engine.zero_stage == 0:
        return _whole_slots(engine)
    return _partition_slots(engine) if engine.zero_stage == 3 else _flat_group_slots(engine)


def _is_first_copy(parameter: torch.nn.Parameter, context: ParallelContext) -> bool:
    """Whether this rank's tensor parallel part, or tied copy, is the first of the equal ones."""
    if context.pipeline_rank > 0 and any(part.name == "embed.weight" for part in parts_of(parameter)):
        return False
    return parameter.tensor_model_parallel or context.tensor_rank == 0  # type: ignore[attr-defined]


def moment_names(engine: Engine) -> tuple[str, ...]:
    """What the engine's optimizer keeps for each parameter."""
    optimizer = base_optimizer(engine)
    if isinstance(optimizer, torch.optim.SGD):
        return ("momentum_buffer",) if any(group["momentum"] for group in optimizer.param_groups) else ()
    return ("exp_avg", "exp_avg_sq")


def _views(engine: Engine, *, saving: bool) -> Iterator[View]:
    """Views of all that this rank saves or, else, of all that it must fill when it loads."""
    context, optimizer = engine.context, base_optimizer(engine)
    for slot in _slots(engine):
        p = slot.parameter
        parts, width = parts_of(p), row_width(_shape(p))
        # Without ZeRO the data ranks hold equal copies; with it they hold different shares.
        saved = _is_first_copy(p, context) and (engine.zero_stage > 0 or context.data_rank == 0)
        if saving or engine.zero_stage == 3:
            yield View(PARAM, parts, width, slot.start, slot.own, saved)
        if slot.master is not None and not (saving and p.dtype == torch.float32):
            yield View(MASTER, parts, width, slot.start, slot.master, saved)
        state = optimizer.state.get(slot.key, {})
        for name in moment_names(engine):
            if state.get(name) is not None:
                moment = state[name].view(-1)[slot.at : slot.at + slot.own.numel()]
                yield View(name, parts, width, slot.start, moment, saved)
    for p in engine.module.parameters():
        if not p.requires_grad and (saving or engine.zero_stage == 3):
            yield from _frozen(p, engine)
        elif not saving and engine.zero_stage < 3:
            yield View(PARAM, parts_of(p), row_width(_shape(p)), 0, p.data.view(-1), False)


def _frozen(p: torch.nn.Parameter, engine: Engine) -> Iterator[View]:
    """A parameter that no optimizer knows."""
    context, first, start, values = engine.context, _is_first_copy(p, engine.context), 0, p.data
    saved = first and context.data_rank == 0
    if engine.zero_stage == 3:
        start, size = _partition(p, context)
        saved, values = first and size > 0, p.ds_tensor.data[: max(0, size)]  # type: ignore[attr-defined]
    yield View(PARAM, parts_of(p), row_width(_shape(p)), start, values.view(-1), saved)


def trained_boxes(engine: Engine) -> dict[str, list[str]]:
    """Logical name -> the boxes of it that train on this rank; those that frozen parameters hold are left out."""
    found: dict[str, list[str]] = {}
    for p in _trained(engine):
        for part in parts_of(p):
            found.setdefault(part.name, []).append(str(Box(part.offset, part.shape)))
    return found


def collect(engine: Engine) -> list[Piece]:
    """The pieces that this rank writes: views of the engine's memory, to be copied or written before the next step."""
    return [piece for view in _views(engine, saving=True) if view.saved for piece in view.pieces()]


def optimizer_step(engine: Engine) -> int:
    """Steps that the optimizer counted on this rank, 0 before the first, -1 where it holds nothing."""
    optimizer = base_optimizer(engine)
    counts = {int(group["step"]) for group in optimizer.param_groups if "step" in group}
    slots = _slots(engine)
    counts |= {int(optimizer.state[s.key]["step"]) for s in slots if "step" in optimizer.state.get(s.key, {})}
    assert len(counts) <= 1, f"the optimizer's step counts differ: {counts}"
    return max(counts) if counts else 0 if slots else -1


def _set_optimizer_step(engine: Engine, step: int) -> None:
    """Make the optimizer's state as it is after `step` steps, with moments still to be filled."""
    optimizer = base_optimizer(engine)
    keys = {id(slot.key): slot.key for slot in _slots(engine)}
    keys |= {id(p): p for group in optimizer.param_groups for p in group["params"]}
    names = moment_names(engine)
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False
    if step == 0 or not names:
        optimizer.state.clear()
        return
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = step
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for key in keys.values():
        state = optimizer.state[key]
        for name in names:
            if state.get(name) is None:
                state[name] = torch.zeros_like(key.data)
        if "step" in state:
            state["step"].fill_(step)
        elif isinstance(optimizer, torch.optim.Optimizer) and not isinstance(optimizer, torch.optim.SGD):
            # torch keeps the count beside the parameter for fused kernels, on the CPU otherwise.
            device = key.device if fused else torch.device("cpu")
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)


def expected_tensors(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Logical name -> shape of what this rank holds a part of."""
    parameters = list(engine.module.parameters())
    return {part.name: part.global_shape for p in parameters for part in parts_of(p)}


@torch.no_grad()
def fill(engine: Engine, checkpoint: Weights, *, optimizer: bool = True, new: Collection[str] = ()) -> None:
    """Fill the engine from a checkpoint, each rank reading only its own boxes. Not collective; `settle` must follow.

    Masters come from the checkpoint's masters, else from its parameters; fp32 parameters from its masters where it has
    them. With optimizer=False the moments start at zero. new: tensors that keep their initial values. Raises
    CheckpointError for a tensor that is not covered.
    """
    step = checkpoint.optimizer_step if optimizer else 0
    missing = [name for name in moment_names(engine) if name not in checkpoint.kinds]
    if step > 0 and missing:
        raise CheckpointError(
            f"{checkpoint.folder} has no {missing[0]} for optimizer.kind = {engine.config.optimizer.kind}; "
            f"it holds {', '.join(checkpoint.kinds)}"
        )
    if engine.zero_stage == 3:
        engine.optimizer.checkpoint_event_prologue()  # parameters that stay gathered give their place to the shares
    _set_optimizer_step(engine, step)
    for view in _views(engine, saving=False):
        for piece in view.pieces():
            if piece.name in new:
                continue
            checkpoint.read(_source(view, checkpoint.kinds), piece.name, piece.box, piece.tensor)


def settle(engine: Engine) -> None:
    """After `fill` on all ranks: bring what DeepSpeed keeps beside the shares up to date. Collective."""
    if engine.zero_stage == 3:
        engine.optimizer.checkpoint_event_epilogue()


def _source(view: View, kinds: dict[str, torch.dtype]) -> str:
    wide = view.values.dtype == torch.float32
    if view.kind in (PARAM, MASTER):
        return MASTER if wide and MASTER in kinds else PARAM
    return view.kind
