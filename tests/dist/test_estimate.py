"""The planner against real ranks: storages of weights, gradients and optimizer, activations, and bytes handed on."""

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megacm3.planning.layout import layout_of, rank_parameters
from megacm3.planning.memory import activation_bytes, buffer_bytes, hand_off_bytes, state_bytes
from megacm3.resolve import load_config
from megacm3.planning.traffic import step_traffic
from tests.helpers.distributed import run_distributed
from tests.helpers.layouts import path_of

# Matrices large beside everything else that a rank holds, and a bucket small beside them.
SHAPE = [
    "model.preset=tiny_chameleon_7b",
    "model.hidden_size=256",
    "model.ffn_size=512",
    "model.vocab_size=2048",
    "model.sequence_length=32",
]
BUCKET = 600_000


@dataclass(frozen=True)
class Case:
    """A layout with four sequences a step."""

    world: int
    zero: int | str
    tensor: int = 1
    pipeline: int = 1
    dtype: str = "fp32"
    micro_batches: int = 2
    sequence: bool = False
    recompute: str = "none"
    extra: tuple[str, ...] = ()
    zero_keys: tuple[tuple[str, int], ...] = ()
    """Of DeepSpeed's section zero_optimization."""
    reduced: str = ""
    """communication_data_type, where the JSON names one."""

    def __str__(self) -> str:
        cut = f"dp{self.world // self.tensor // self.pipeline}-tp{self.tensor}{'s' if self.sequence else ''}"
        end = "-".join([*(text.partition("=")[2] for text in self.extra), *(str(n) for _, n in self.zero_keys)])
        end += self.reduced
        return f"{cut}-pp{self.pipeline}-zero{self.zero}-{self.dtype}-m{self.micro_batches}-{self.recompute}-{end}"

    def overrides(self, folder: Path) -> list[str]:
        tree = json.loads(path_of(self.zero).read_text())
        if self.zero:
            tree["zero_optimization"] |= {"reduce_bucket_size": BUCKET, **dict(self.zero_keys)}
        if self.reduced:
            tree["communication_data_type"] = self.reduced
        (folder / "ds.json").write_text(json.dumps(tree))
        data = self.world // self.tensor // self.pipeline
        return [
            *SHAPE,
            "train.global_batch=4",
            f"train.micro_batch={4 // data // self.micro_batches}",
            f"train.dtype={self.dtype}",
            f"parallel.tensor={self.tensor}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.sequence={str(self.sequence).lower()}",
            f"parallel.recompute={self.recompute}",
            f"deepspeed={folder / 'ds.json'}",
            *self.extra,
        ]


def _watched(engine: Any, look: Any) -> None:
    """Call `look` whenever a backward pass has ended, before what follows it."""
    inner = engine.engine
    if engine.context.pipeline > 1:
        from deepspeed.runtime.pipe.schedule import OptimizerStep

        step = inner._INSTRUCTION_MAP[OptimizerStep]
        inner._INSTRUCTION_MAP = {**inner._INSTRUCTION_MAP, OptimizerStep: lambda *a, **k: (look(), step(*a, **k))}
        return
    after = inner.step
    inner.step = lambda *a, **k: (look(), after(*a, **k))


def _staged(optimizer: Any) -> int:
    """Bytes of the buckets through which ZeRO reduces gradients, where they are alive: buffers, not states."""
    buckets = getattr(optimizer, "ipg_buckets", {}).values()
    tensors = [bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer] for bucket in buckets]
    return sum(tensor.nbytes for some in tensors for tensor in some if tensor is not None)


def states(overrides: list[str]) -> tuple[int, int]:
    """On a rank, in the second step: (most bytes alive after a backward pass, pipeline stage)."""
    from tests.helpers.layouts import batch, micro_batches, start
    from tests.helpers.memory import live_bytes

    before = live_bytes()
    config, context, engine = start(overrides)
    engine.train_step(micro_batches(batch(0, config), config, context))
    found: list[int] = []
    data = micro_batches(batch(1, config), config, context)
    before += sum(tensor.nbytes for rows in data for tensor in rows.values())
    _watched(engine, lambda: found.append(live_bytes() - before - _staged(engine.optimizer)))
    engine.train_step(data)
    return max(found), context.pipeline_rank


def few(cases: Sequence[Any]) -> list[Any]:
    """Every fourth case; the others are long tests."""
    return [case if i % 4 == 0 else pytest.param(case, marks=pytest.mark.long) for i, case in enumerate(cases)]


STATES = (
    Case(1, 0),
    Case(2, 0),
    Case(2, 0, dtype="bf16"),
    Case(1, 1),
    Case(2, 1),
    Case(2, 1, micro_batches=1),
    Case(2, 1, dtype="bf16"),
    Case(2, 2),
    Case(2, 2, dtype="bf16"),
    Case(2, 3),
    Case(2, 3, dtype="bf16"),
    Case(2, 1, tensor=2, sequence=True),
    Case(2, 3, tensor=2, dtype="bf16"),
    Case(2, 1, pipeline=2),
    Case(4, 1, pipeline=2, dtype="bf16"),
    Case(4, 2, tensor=2, dtype="bf16"),
    Case(2, 1, extra=("optimizer.kind=sgd",)),
)


@pytest.mark.parametrize("case", few(STATES), ids=str)
def test_states_are_the_storages_of_the_ranks(case: Case, tmp_path: Path) -> None:
    """Within 1 %, with what a pipeline keeps of the hidden states it handed on."""
    overrides = case.overrides(tmp_path)
    config = load_config(None, overrides)
    layout = layout_of(config, case.world)
    for measured, stage in run_distributed(states, case.world, overrides=overrides):
        count = rank_parameters(config.model, layout, stage)
        expected = state_bytes(count, layout, config.optimizer.kind).states + hand_off_bytes(config, layout, stage)
        assert expected == pytest.approx(measured, rel=0.01), (expected / count, measured / count)


def reducing(overrides: list[str]) -> int:
    """On a rank, in the second step: most bytes alive at a collective."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from tests.helpers.layouts import batch, micro_batches, start
    from tests.helpers.memory import live_bytes

    found: list[int] = []

    class Looking(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.namespace == "c10d":
                found.append(live_bytes() - before)
            return function(*args, **(kwargs or {}))

    before = live_bytes()
    config, context, engine = start(overrides)
    engine.train_step(micro_batches(batch(0, config), config, context))
    data = micro_batches(batch(1, config), config, context)
    with Looking():
        engine.train_step(data)
    return max(found)


FLATTENED = (Case(2, 0), Case(2, 0, dtype="bf16"), Case(1, 1, dtype="bf16"), Case(2, 1, dtype="bf16"))


@pytest.mark.parametrize("case", few(FLATTENED), ids=str)
def test_states_and_flattened_gradients(case: Case, tmp_path: Path) -> None:
    """Within 1 %: what a rank holds while gradients are summed over the data ranks."""
    overrides = case.overrides(tmp_path)
    config = load_config(None, overrides)
    layout = layout_of(config, case.world)
    count = rank_parameters(config.model, layout, 0)
    expected = state_bytes(count, layout).states + buffer_bytes(config, layout, 0, count)
    for measured in run_distributed(reducing, case.world, overrides=overrides):
        assert expected == pytest.approx(measured, rel=0.01)


def test_zero_3_cuts_the_weights(tmp_path: Path) -> None:
    """After a step each of four ranks holds a quarter of weights, gradients and optimizer."""
    case = Case(4, 3, micro_batches=1)
    overrides = case.overrides(tmp_path)
    whole = rank_parameters(load_config(None, overrides).model, layout_of(load_config(None, overrides), 4), 0)
    for measured, _ in run_distributed(states, 4, overrides=overrides):
        assert measured == pytest.approx(20 * whole / 4, rel=0.01)


def kept(overrides: list[str]) -> tuple[int, int]:
    """On a rank: (bytes that a forward pass of one micro-batch leaves alive, pipeline stage)."""
    import torch

    from tests.helpers.layouts import batch, micro_batches, start
    from tests.helpers.memory import live_bytes

    config, context, engine = start(overrides)
    (data,) = micro_batches(batch(0, config), config, context)[:1]
    inputs = engine._inputs(data)
    engine.module(*inputs).backward()
    engine.module.zero_grad()
    gc.collect()
    before = live_bytes()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        loss = engine.module(*inputs)
    held = live_bytes() - before
    assert loss.requires_grad
    return held, context.pipeline_rank


KEPT = [
    Case(
        2, 0, tensor=2, sequence=sequence, recompute=recompute, micro_batches=2, extra=(f"model.preset={preset}", *long)
    )
    for long in [("model.sequence_length=256",)]
    for preset in ("tiny_cm3leon",)
    for sequence in (False, True)
    for recompute in ("none", "selective", "full")
]


@pytest.mark.parametrize("case", few(KEPT), ids=str)
def test_activations_of_tensor_ranks(case: Case, tmp_path: Path) -> None:
    """Within 10 %."""
    overrides = case.overrides(tmp_path)
    config = load_config(None, overrides)
    expected = activation_bytes(config, layout_of(config, 2), 0)
    for measured, _ in run_distributed(kept, 2, overrides=overrides):
        assert expected == pytest.approx(measured, rel=0.1)


def _ranks(arguments: Any) -> int:
    """In the process group among the arguments of a collective."""
    import torch
    import torch.distributed as dist

    (group,) = [
        argument
        for argument in arguments
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())
    ]
    return dist.ProcessGroup.unbox(group).size()


def handed_on(overrides: list[str]) -> tuple[dict[str, int], int]:
    """On a rank, in the second step: (bytes of whole tensors by operation, pipeline stage).

    Without collectives of a single rank, through which DeepSpeed takes gradients where it has one data rank.
    """
    from megacm3.parallel.dryrun import CollectiveCounter
    from tests.helpers.layouts import batch, micro_batches, start

    class BetweenRanks(CollectiveCounter):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.namespace == "c10d" and _ranks(args) == 1:
                return function(*args, **(kwargs or {}))
            return super().__torch_dispatch__(function, types, args, kwargs)

    config, context, engine = start(overrides)
    engine.train_step(micro_batches(batch(0, config), config, context))
    with BetweenRanks() as counter:
        engine.train_step(micro_batches(batch(1, config), config, context))
    return dict(counter.bytes), context.pipeline_rank


REACH, AHEAD, LIVE = "stage3_max_reuse_distance", "stage3_prefetch_bucket_size", "stage3_max_live_parameters"
NONE_KEPT = ((REACH, 0), (AHEAD, 0))
NEAR_KEPT = ((REACH, 2_500_000), (AHEAD, 0))
AHEAD_KEPT = ((REACH, 0), (AHEAD, 300_000), (LIVE, 1_500_000))
TRAFFIC = (
    Case(2, 0),
    Case(2, 0, dtype="bf16"),
    Case(2, 1),
    Case(2, 1, dtype="bf16"),
    Case(2, 2),
    Case(2, 2, dtype="bf16"),
    Case(2, 3),
    Case(2, 3, dtype="bf16"),
    Case(2, 3, zero_keys=NONE_KEPT),
    Case(2, 3, zero_keys=NEAR_KEPT),
    Case(2, 3, zero_keys=AHEAD_KEPT),
    Case(2, 3, zero_keys=NEAR_KEPT, recompute="full"),
    Case(2, 3, zero_keys=NEAR_KEPT, extra=("model.preset=tiny_cm3leon",)),
    Case(2, 1, dtype="bf16", reduced="bf16"),
    Case(2, 2, dtype="bf16", reduced="bf16"),
    Case(2, 3, dtype="bf16", reduced="bf16"),
    Case(2, 0, tensor=2),
    Case(2, 0, tensor=2, sequence=True, recompute="full"),
    Case(2, 0, pipeline=2),
    Case(2, 1, pipeline=2, extra=("model.preset=tiny_cm3leon",)),
    Case(2, 1, pipeline=2, dtype="bf16", extra=("model.preset=tiny_cm3leon",)),
)


@pytest.mark.parametrize("case", few(TRAFFIC), ids=str)
def test_traffic_is_what_ranks_hand_on(case: Case, tmp_path: Path) -> None:
    """Within 1 %, the sums of a few numbers included."""
    overrides = case.overrides(tmp_path)
    config = load_config(None, overrides)
    layout = layout_of(config, case.world)
    for found, stage in run_distributed(handed_on, case.world, overrides=overrides):
        expected: dict[str, int] = {}
        for item in step_traffic(config, layout, stage, rank_parameters(config.model, layout, stage)):
            expected[item.operation] = expected.get(item.operation, 0) + item.bytes
        found.pop("receive", None)
        small = {name: size for name, size in found.items() if name not in expected}
        assert sum(small.values()) < 0.01 * sum(found.values()), small
        assert expected == pytest.approx({name: found.get(name, 0) for name in expected}, rel=0.01), found
