"""The planner against real ranks: storages of weights, gradients and optimizer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megacm3.estimate import layout_of, rank_parameters, state_bytes
from megacm3.resolve import load_config
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

    def __str__(self) -> str:
        cut = f"dp{self.world // self.tensor // self.pipeline}-tp{self.tensor}{'s' if self.sequence else ''}"
        end = "-".join(text.partition("=")[2] for text in self.extra)
        return f"{cut}-pp{self.pipeline}-zero{self.zero}-{self.dtype}-m{self.micro_batches}-{self.recompute}-{end}"

    def overrides(self, folder: Path) -> list[str]:
        tree = json.loads(path_of(self.zero).read_text())
        if self.zero:
            tree["zero_optimization"]["reduce_bucket_size"] = BUCKET
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
)


@pytest.mark.parametrize("case", STATES, ids=str)
def test_states_are_the_storages_of_the_ranks(case: Case, tmp_path: Path) -> None:
    """Within 1 %."""
    overrides = case.overrides(tmp_path)
    config = load_config(None, overrides)
    layout = layout_of(config, case.world)
    for measured, stage in run_distributed(states, case.world, overrides=overrides):
        count = rank_parameters(config.model, layout, stage)
        expected = state_bytes(count, layout, config.optimizer.kind).states
        assert expected == pytest.approx(measured, rel=0.01), (expected / count, measured / count)
