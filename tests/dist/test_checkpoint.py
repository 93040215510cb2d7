"""Saving and loading an engine: bitwise in the same layout, exact in any other, nothing half-done after a failure."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megacm3.checkpoint.boxes import whole
from megacm3.checkpoint.commit import clear_leftovers, discover, leftovers
from megacm3.checkpoint.reader import Checkpoint
from megacm3.errors import CheckpointError
from tests.helpers.distributed import ROOT, RankError, run_distributed
from tests.helpers.layouts import ADAM, batch, micro_batches, start

BASE = ["train.global_batch=4", "train.micro_batch=1", "train.steps=10", "model.layers=2", *ADAM[:4]]


def overrides(preset: str = "tiny_modern", zero: int = 1, **keys: Any) -> list[str]:
    """A tiny run; keys in dotted form with __ for the dot."""
    given = [f"{key.replace('__', '.')}={value}" for key, value in keys.items()]
    return [f"model.preset={preset}", f"deepspeed={ROOT}/ds_configs/zero{zero}.json", *BASE, *given]


def run(
    keys: list[str], folder: str, load_from: str = "", until: int = 4, save_at: tuple[int, ...] = (2, 4), **saving: Any
) -> dict[str, Any]:
    """What a rank does: load if asked, train to `until`, save on the way."""
    from megacm3.checkpoint.store import Saver, load

    config, context, engine = start(keys)
    step, losses, state = 0, [], None
    if load_from:
        state = load(engine, context, Path(load_from))
        step = state["step"]
    saver = Saver(engine, context, Path(folder), saving.get("keep", 0))
    if step in save_at and load_from != str(Path(folder) / f"step_{step:06d}"):
        saver.start(step, {"step": step})
        saver.finish()
    while step < until:
        result = engine.train_step(micro_batches(batch(step, config), config, context))
        step += 1
        losses.append((float(result.sums[0]), result.grad_norm, result.output_norm))
        saver.poll()
        if step in save_at:
            saver.start(step, {"step": step, "text": "ü"}, background=saving.get("background", False))
    saver.finish()
    saver.close()
    return {"losses": losses, "state": state}


def contents(step: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every logical tensor of a checkpoint, whole, by kind."""
    checkpoint = Checkpoint(step, verify="sha256")
    tensors = {}
    for kind, dtype in checkpoint.kinds.items():
        for name, shape in checkpoint.shapes.items():
            out = torch.full(shape, float("nan"), dtype=dtype)
            checkpoint.read(kind, name, whole(shape), out)
            tensors[kind, name] = out
    return tensors


def assert_equal(first: Path, second: Path) -> None:
    a, b = contents(first), contents(second)
    assert a.keys() == b.keys()
    differing = [key for key in a if not torch.equal(a[key], b[key])]
    assert not differing, differing


BITWISE = {
    "zero0-dp2-bf16": (2, overrides(zero=0, train__dtype="bf16")),
    "zero1-tp2-sequence": (2, overrides(zero=1, parallel__tensor=2, parallel__sequence="true")),
    "zero1-pp2-tied-bf16": (2, overrides("tiny_cm3leon", 1, parallel__pipeline=2, train__dtype="bf16")),
    "zero3-dp2": (2, overrides(zero=3)),
    "zero1-dropout-recompute": (2, overrides(model__dropout=0.1, parallel__recompute="full")),
}
LONG_BITWISE = {
    "zero0": (1, overrides(zero=0)),
    "zero1-pp2-swin": (2, overrides("tiny_chameleon_34b", 1, parallel__pipeline=2)),
    "zero1-sgd": (2, overrides(optimizer__kind="sgd")),
    "zero2-dp2-bf16": (2, overrides("tiny_cm3leon", 2, train__dtype="bf16")),
    "zero3-dp2-bf16": (2, overrides("tiny_chameleon_7b", 3, train__dtype="bf16")),
    "zero0-pp2": (2, overrides(zero=0, parallel__pipeline=2)),
    "zero1-tp2-pp2": (4, overrides("tiny_cm3leon", 1, parallel__tensor=2, parallel__pipeline=2)),
    "zero1-tp2-dp2-bf16": (4, overrides("tiny_chameleon_34b", 1, parallel__tensor=2, train__dtype="bf16")),
    "zero3-tp2-dp2-sequence": (4, overrides(zero=3, parallel__tensor=2, parallel__sequence="true")),
    "zero2-dp4": (4, overrides(zero=2)),
    "zero1-padding": (2, overrides(zero=1, parallel__tensor=2, model__vocab_size=509, model__vocab_rows=512)),
}


@pytest.mark.parametrize("world, keys", BITWISE.values(), ids=BITWISE.keys())
def test_resume_is_bitwise(world: int, keys: list[str], tmp_path: Path) -> None:
    unbroken = run_distributed(run, world, keys=keys, folder=str(tmp_path / "a"))
    resumed = run_distributed(
        run, world, keys=keys, folder=str(tmp_path / "b"), load_from=str(tmp_path / "a/step_000002")
    )
    assert resumed[0]["state"] == {"step": 2, "text": "ü"}
    assert [answer["losses"] for answer in resumed] == [answer["losses"][2:] for answer in unbroken]
    assert_equal(tmp_path / "a/step_000004", tmp_path / "b/step_000004")


@pytest.mark.long
@pytest.mark.parametrize("world, keys", LONG_BITWISE.values(), ids=LONG_BITWISE.keys())
def test_resume_is_bitwise_in_more_layouts(world: int, keys: list[str], tmp_path: Path) -> None:
    test_resume_is_bitwise(world, keys, tmp_path)


MOVES = [
    pytest.param(
        *(2, overrides("tiny_chameleon_34b"), 2, overrides("tiny_chameleon_34b", parallel__tensor=2)), id="dp2-to-tp2"
    ),
    pytest.param(
        *(2, overrides("tiny_cm3leon", parallel__pipeline=2), 2, overrides("tiny_cm3leon", 3)), id="pp2-tied-to-zero3"
    ),
    pytest.param(
        *(2, overrides(zero=2, train__dtype="bf16"), 1, overrides(zero=0, train__dtype="bf16")),
        id="zero2-bf16-to-zero0",
    ),
    pytest.param(
        *(2, overrides(parallel__tensor=2), 2, overrides(zero=0, parallel__pipeline=2)),
        id="tp2-to-pp2-zero0",
        marks=pytest.mark.long,
    ),
    pytest.param(
        *(2, overrides(zero=3, train__dtype="bf16"), 2, overrides(parallel__tensor=2, train__dtype="bf16")),
        id="zero3-bf16-to-zero1-tp2",
        marks=pytest.mark.long,
    ),
]


@pytest.mark.parametrize("world, before, other_world, after", MOVES)
def test_every_layout_reads_every_other(
    world: int, before: list[str], other_world: int, after: list[str], tmp_path: Path
) -> None:
    """Parameters, masters and moments are exactly equal after a move to another layout; training goes on alike."""
    unbroken = run_distributed(run, world, keys=before, folder=str(tmp_path / "a"))
    moved = run_distributed(
        run, other_world, keys=after, folder=str(tmp_path / "b"), load_from=str(tmp_path / "a/step_000002")
    )
    assert_equal(tmp_path / "a/step_000002", tmp_path / "b/step_000002")
    for (loss, norm, _), (moved_loss, moved_norm, _) in zip(unbroken[0]["losses"][2:], moved[0]["losses"], strict=True):
        tolerance = 1e-5 if "train.dtype=bf16" not in after else 2e-3
        assert moved_loss == pytest.approx(loss, rel=tolerance)
        assert moved_norm == pytest.approx(norm, rel=20 * tolerance)


def test_weights_alone_start_a_new_run_and_a_wider_type(tmp_path: Path) -> None:
    """bf16 -> fp32 takes the masters; without its optimizer the checkpoint gives the first step's moments anew."""
    run_distributed(run, 1, keys=overrides(train__dtype="bf16"), folder=str(tmp_path / "a"), until=2)
    wide = contents(tmp_path / "a/step_000002")
    run_distributed(
        weights_only, 1, keys=overrides(), folder=str(tmp_path / "b"), load_from=str(tmp_path / "a/step_000002")
    )
    checkpoint, found = Checkpoint(tmp_path / "b/step_000002"), contents(tmp_path / "b/step_000002")
    assert checkpoint.optimizer_step == 0 and set(checkpoint.kinds) == {"param"}
    assert all(torch.equal(found["param", name], wide["master", name]) for name in checkpoint.shapes)


def weights_only(keys: list[str], folder: str, load_from: str) -> None:
    from megacm3.checkpoint.store import load, save

    _, context, engine = start(keys)
    load(engine, context, Path(load_from), optimizer=False)
    save(engine, context, Path(folder), 2, {"step": 2}, 0)


def test_background_saves_hold_the_moment_of_the_copy(tmp_path: Path) -> None:
    keys = overrides(train__dtype="bf16")
    run_distributed(run, 2, keys=keys, folder=str(tmp_path / "a"), save_at=(1, 2, 3, 4))
    run_distributed(run, 2, keys=keys, folder=str(tmp_path / "b"), save_at=(1, 2, 3, 4), background=True)
    for step in (1, 2, 3, 4):
        assert_equal(tmp_path / f"a/step_{step:06d}", tmp_path / f"b/step_{step:06d}")


def attempt(keys: list[str], step_folder: str) -> str:
    """What `load` says on this rank."""
    from megacm3.checkpoint.store import load

    _, context, engine = start(keys)
    try:
        load(engine, context, Path(step_folder))
    except CheckpointError as error:
        return str(error)
    return "loaded"


def damage(step: Path, how: str) -> str:
    """Harm a committed step; return what every rank must say."""
    file = step / "rank_00001.safetensors"
    if how == "flipped":
        with open(file, "r+b") as handle:
            handle.seek(-5, 2)
            byte = handle.read(1)
            handle.seek(-5, 2)
            handle.write(bytes([byte[0] ^ 1]))
        return f"{file} is damaged: sha256 "
    if how == "truncated":
        os.truncate(file, file.stat().st_size - 1)
        return f"{file} has {file.stat().st_size} bytes; its manifest says {file.stat().st_size + 1}"
    if how == "deleted":
        file.unlink()
        return f"{file} is missing"
    manifest = step / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 3'))
    return f"{manifest} was changed by hand"


@pytest.mark.parametrize(
    "how", ["flipped", "truncated", *(pytest.param(how, marks=pytest.mark.long) for how in ("deleted", "edited"))]
)
def test_a_damaged_step_is_refused_on_every_rank(how: str, tmp_path: Path) -> None:
    run_distributed(run, 2, keys=overrides(), folder=str(tmp_path), save_at=(1, 2), until=2)
    expected = damage(tmp_path / "step_000002", how)
    said = run_distributed(attempt, 2, keys=overrides(), step_folder=str(tmp_path / "step_000002"))
    assert said[0] == said[1] and said[0].startswith(expected), said
    valid = [path.name for path in discover(tmp_path)]
    # Contents are hashed when a step is loaded, sizes already when steps are listed.
    assert valid == (["step_000002", "step_000001"] if how == "flipped" else ["step_000001"])


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    run_distributed(run, 1, keys=overrides(), folder=str(tmp_path), save_at=(1,), until=1)
    step = str(tmp_path / "step_000001")
    (deeper,) = run_distributed(attempt, 1, keys=overrides(model__layers=4), step_folder=step)
    assert "lacks layers.2.attn.k.weight" in deeper
    (tied,) = run_distributed(attempt, 1, keys=overrides(model__tied="true"), step_folder=step)
    assert "has besides head.weight" in tied
    (wider,) = run_distributed(attempt, 1, keys=overrides(model__ffn_size=96), step_folder=step)
    assert "layers.0.mlp.gate.weight has shape (128, 64); the config expects (96, 64)" in wider
    (momentum,) = run_distributed(attempt, 1, keys=overrides("tiny_cm3leon"), step_folder=step)
    assert "lacks" in momentum and "positions.weight" in momentum


def struck(keys: list[str], folder: str, fault: str) -> str:
    """Save step 1, then step 2 under a fault; what the second save says."""
    from megacm3.checkpoint.store import save

    config, context, engine = start(keys)
    said = ""
    for step in (1, 2):
        engine.train_step(micro_batches(batch(step, config), config, context))
        os.environ["MEGACM3_FAULT"] = fault if step == 2 else ""
        try:
            save(engine, context, Path(folder), step, {"step": step}, 0)
        except CheckpointError as error:
            said = str(error)
    return said


@pytest.mark.parametrize(
    "fault, newest",
    [
        ("save.writing:rank=1:step=2:kill9", 1),
        ("save.before_pointer:step=2:kill9", 2),
        pytest.param("save.before_write:rank=1:step=2:kill9", 1, marks=pytest.mark.long),
        pytest.param("save.written:rank=0:step=2:kill9", 1, marks=pytest.mark.long),
        pytest.param("save.before_rename:step=2:kill9", 1, marks=pytest.mark.long),
    ],
)
def test_a_killed_save_leaves_a_whole_step(fault: str, newest: int, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with pytest.raises(RankError, match="SIGKILL"):
        run_distributed(struck, 2, keys=overrides(), folder=str(folder), fault=fault)
    assert discover(folder)[0].name == f"step_{newest:06d}"
    assert {path.name for path in folder.iterdir()} >= {"step_000001"}
    clear_leftovers(folder)
    assert not leftovers(folder)
    # The next start goes on from it, exactly as the run that was not killed.
    keys = overrides()
    run_distributed(run, 2, keys=keys, folder=str(tmp_path / "b"), load_from=str(discover(folder)[0]), save_at=(4,))
    assert discover(tmp_path / "b")[0].name == "step_000004"


def test_a_full_disk_fails_on_every_rank_and_leaves_nothing(tmp_path: Path) -> None:
    said = run_distributed(limited, 2, keys=overrides(), folder=str(tmp_path))
    assert said[0] == said[1] and "rank_00001.safetensors could not be written: File too large" in said[0]
    assert [path.name for path in discover(tmp_path)] == ["step_000001"] and not leftovers(tmp_path)


def limited(keys: list[str], folder: str) -> str:
    """Rank 1 may write no file longer than 50,000 bytes when step 2 is saved."""
    import resource

    from megacm3.checkpoint.store import save

    _, context, engine = start(keys)
    said = ""
    for step in (1, 2):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if step == 2 and context.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            save(engine, context, Path(folder), step, {"step": step}, 0)
        except CheckpointError as error:
            said = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return said


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    run_distributed(run, 1, keys=overrides(), folder=str(tmp_path), save_at=(1, 2, 3, 4), keep=2)
    assert [path.name for path in discover(tmp_path)] == ["step_000004", "step_000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000003", "step_000004"]
    assert (tmp_path / "latest").read_text() == "step_000004\n"
    # A step written anew, below others, is not the one that goes.
    run_distributed(run, 1, keys=overrides(), folder=str(tmp_path), save_at=(1,), until=1, keep=1)
    assert [path.name for path in discover(tmp_path)] == ["step_000001"]
