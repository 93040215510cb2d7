"""The same numbers in every layout, and a red test for each known way to lose them.

Compared with one process without ZeRO, in fp32 over 5 steps with clipping active and uneven numbers of targets: SGD to
loss 1e-6, gradient norm 1e-5, every logical tensor's update 1e-4 (relative); Adam to loss 1e-5.
"""

from dataclasses import dataclass

import pytest

from tests.helpers.distributed import ROOT, run_distributed
from tests.helpers.layouts import (
    ADAM,
    SGD,
    Run,
    batch,
    compare,
    compare_curves,
    micro_batches,
    path_of,
    reference,
    start,
    trained,
)

FAMILIES = ("tiny_cm3leon", "tiny_chameleon_7b", "tiny_chameleon_34b")
MASKED = ("data.document_mask=true", "data.position_reset=true")


@dataclass(frozen=True)
class Layout:
    """How a case is cut. `zero` names a file of ds_configs/: a stage, or one of the offloading ones."""

    world: int
    zero: int | str = 0
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    recompute: str = "none"
    micro_batch: int = 2

    def __str__(self) -> str:
        parts = [f"dp{self.world // (self.tensor * self.pipeline)}", f"tp{self.tensor}{'s' if self.sequence else ''}"]
        return "-".join([*parts, f"pp{self.pipeline}", f"zero{self.zero}", self.recompute, f"micro{self.micro_batch}"])

    def overrides(self) -> list[str]:
        return [
            f"parallel.tensor={self.tensor}",
            f"parallel.sequence={str(self.sequence).lower()}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.recompute={self.recompute}",
            f"train.micro_batch={self.micro_batch}",
        ]

    def run(self, preset: str, *overrides: str, fault: str = "") -> Run:
        keys = [f"model.preset={preset}", *overrides, *self.overrides()]
        return trained(self.world, keys, zero=self.zero, fault=fault)


# The eight sequences of a step are cut in 8 / (micro_batch x data ranks) micro-batches.
GRID = (
    Layout(1, zero=1, recompute="selective", micro_batch=1),
    Layout(1, zero=3, recompute="full", micro_batch=4),
    Layout(1, zero=0, recompute="full", micro_batch=8),
    Layout(2, zero=0),
    Layout(2, zero=1, micro_batch=1),
    Layout(2, zero=2, recompute="selective"),
    Layout(2, zero=3, micro_batch=1),
    Layout(2, zero=0, tensor=2, micro_batch=1),
    Layout(2, zero=1, tensor=2, sequence=True, recompute="full"),
    Layout(2, zero=2, tensor=2, sequence=True, micro_batch=4),
    Layout(2, zero=3, tensor=2, recompute="selective"),
    Layout(2, zero=0, pipeline=2, micro_batch=1),
    Layout(2, zero=1, pipeline=2, recompute="full", micro_batch=4),
    Layout(2, zero="offload", recompute="full"),
    Layout(2, zero="zero3_offload"),
    Layout(4, zero=1, tensor=2, recompute="selective", micro_batch=1),
    Layout(4, zero=2, tensor=2, sequence=True, recompute="full", micro_batch=4),
    Layout(4, zero=3, tensor=2, sequence=True, recompute="full", micro_batch=1),
    Layout(4, zero=0, tensor=4, sequence=True, recompute="selective"),
    Layout(4, zero=3, tensor=4, micro_batch=8),
    Layout(4, zero=0, pipeline=2, recompute="selective", micro_batch=1),
    Layout(4, zero=1, pipeline=2, micro_batch=4),
    Layout(4, zero=0, tensor=2, sequence=True, pipeline=2),
    Layout(4, zero=1, tensor=2, pipeline=2, recompute="full", micro_batch=1),
    Layout(4, zero=1, tensor=2, sequence=True, pipeline=2, recompute="full", micro_batch=4),
)

# In the default suite: one of each kind, for every family, and the layouts in which a known fault would show.
SPREAD = ("tiny_cm3leon", Layout(4, zero=1, tensor=2, sequence=True, pipeline=2, micro_batch=1))
TIED = ("tiny_cm3leon", Layout(2, zero=0, pipeline=2))
HEADS = ("tiny_chameleon_7b", Layout(2, zero=1, tensor=2))
POSITIONS = ("tiny_chameleon_34b", Layout(2, zero=0, tensor=2, sequence=True, recompute="full"))
SHORT = (
    SPREAD,
    TIED,
    HEADS,
    POSITIONS,
    ("tiny_cm3leon", Layout(2, zero=3, recompute="full")),
    ("tiny_chameleon_34b", Layout(4, zero=2, tensor=2, sequence=True, recompute="selective")),
    ("tiny_cm3leon", Layout(2, zero="offload")),
    ("tiny_chameleon_7b", Layout(2, zero="zero3_offload")),
)


def test_every_file_of_ds_configs_is_run() -> None:
    """By the tests below; the pipelines among them use zero0 and zero1."""
    files = {path.stem for path in (ROOT / "ds_configs").glob("*.json")}
    assert files == {path_of(layout.zero).stem for _, layout in SHORT}
    assert files == {path_of(layout.zero).stem for layout in GRID}


@pytest.mark.parametrize("preset, layout", SHORT, ids=str)
def test_layouts_agree(preset: str, layout: Layout) -> None:
    compare(layout.run(preset, *SGD), reference(f"model.preset={preset}", *SGD))


def test_dropout_and_documents_agree() -> None:
    """Masks are keyed by sequence and position: dropout is no exception."""
    options = (*SGD, "model.dropout=0.1", *MASKED)
    layout = Layout(4, zero=1, tensor=2, sequence=True, pipeline=2, recompute="full")
    run = layout.run("tiny_chameleon_34b", *options)
    compare(run, reference("model.preset=tiny_chameleon_34b", *options))
    assert run.losses != reference("model.preset=tiny_chameleon_34b", *SGD).losses


def test_adam_agrees() -> None:
    run = Layout(4, zero=2, tensor=2, sequence=True).run("tiny_chameleon_7b", *ADAM)
    compare_curves(run, reference("model.preset=tiny_chameleon_7b", *ADAM), 1e-5)


def test_padded_rows_of_the_table_change_nothing() -> None:
    """500 ids in a table of 512 rows: the last tensor rank holds padding."""
    ids = "model.vocab_size=500"
    run = Layout(2, zero=1, tensor=2).run("tiny_chameleon_7b", *SGD, ids, "model.vocab_rows=512")
    compare(run, reference("model.preset=tiny_chameleon_7b", *SGD, ids))


@pytest.mark.long
@pytest.mark.parametrize("layout", GRID, ids=str)
@pytest.mark.parametrize("preset", FAMILIES)
def test_grid(preset: str, layout: Layout) -> None:
    compare(layout.run(preset, *SGD), reference(f"model.preset={preset}", *SGD))


@pytest.mark.long
@pytest.mark.parametrize("layout", GRID[3::3], ids=str)
@pytest.mark.parametrize("preset", FAMILIES)
def test_grid_with_dropout_and_documents(preset: str, layout: Layout) -> None:
    options = (*SGD, "model.dropout=0.1", *MASKED)
    compare(layout.run(preset, *options), reference(f"model.preset={preset}", *options))


@pytest.mark.long
@pytest.mark.parametrize("layout", GRID[::3], ids=str)
@pytest.mark.parametrize("preset", FAMILIES)
def test_grid_with_adam(preset: str, layout: Layout) -> None:
    compare_curves(layout.run(preset, *ADAM), reference(f"model.preset={preset}", *ADAM), 1e-5)


BF16 = (
    Layout(1, zero=0),
    Layout(2, zero=0, tensor=2, sequence=True),
    Layout(2, zero=1),
    Layout(2, zero=2, recompute="full"),
    Layout(2, zero=3),
    Layout(2, zero="offload"),
    Layout(2, zero=1, pipeline=2),
    Layout(4, zero=1, tensor=2, sequence=True, pipeline=2, recompute="full"),
    Layout(4, zero=3, tensor=2),
)


def _near_fp32(preset: str, layout: Layout) -> None:
    base = reference(f"model.preset={preset}", *ADAM)
    run = layout.run(preset, *ADAM, "train.dtype=bf16")
    assert run.differing == ""
    assert run.losses == pytest.approx(base.losses, rel=1e-3)
    # A share of the norm would be lost or counted twice; an Adam step too many would make the updates 15 % smaller.
    assert run.norms == pytest.approx(base.norms, rel=1e-2)
    size = sum(float((run.after[n] - run.before[n]).square().sum()) for n in base.after) ** 0.5
    expected = sum(float((base.after[n] - base.before[n]).square().sum()) for n in base.after) ** 0.5
    assert size == pytest.approx(expected, rel=1e-2)


def test_bf16_stays_near_fp32() -> None:
    _near_fp32("tiny_chameleon_7b", BF16[1])


@pytest.mark.long
@pytest.mark.parametrize("layout", BF16, ids=str)
@pytest.mark.parametrize("preset", FAMILIES)
def test_bf16_grid(preset: str, layout: Layout) -> None:
    _near_fp32(preset, layout)


@pytest.mark.parametrize(
    "fault, preset, layout",
    [("unsummed", *HEADS), ("unsummed", *POSITIONS), ("partitioned", *SPREAD), ("tied_twice", *TIED)],
    ids=str,
)
def test_a_known_fault_put_back_turns_this_red(fault: str, preset: str, layout: Layout) -> None:
    """`test_layouts_agree` has the same layouts without the fault."""
    run = layout.run(preset, *SGD, fault=fault)
    with pytest.raises(AssertionError):
        compare(run, reference(f"model.preset={preset}", *SGD))


def perturbed(overrides: list[str], name: str) -> str:
    """On a rank: train a step, then change one number of a replicated parameter on the last tensor rank."""
    import torch

    from megacm3.errors import CheckpointError
    from megacm3.parallel.replicated import check_replicas, replicas

    config, context, engine = start(overrides)
    engine.train_step(micro_batches(batch(0, config), config, context))
    check_replicas(engine.module, context)
    for found, parameter in replicas(engine.module):
        if found == name and context.tensor_rank == context.tensor - 1:
            with torch.no_grad():
                local = getattr(parameter, "ds_tensor", parameter).view(-1)
                local[0] += torch.finfo(local.dtype).eps * 2
    try:
        check_replicas(engine.module, context)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "layout",
    [Layout(4, zero=1, tensor=2, pipeline=2), Layout(2, zero=3, tensor=2), Layout(2, zero=0, tensor=2)],
    ids=str,
)
def test_one_bit_of_a_replica_stops_the_run_naming_it(layout: Layout) -> None:
    name = "layers.3.attn.k_norm.weight"
    keys = ["model.preset=tiny_chameleon_7b", *SGD, *layout.overrides(), f"deepspeed=ds_configs/zero{layout.zero}.json"]
    messages = run_distributed(perturbed, layout.world, overrides=keys, name=name)
    assert all("replicated parameters differ" in message for message in messages), "every rank stops"
    assert messages[-1].count("layers.") == 1 and name in messages[-1]
