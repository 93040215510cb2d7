"""Training a part of the weights: the same numbers in every layout, the rest bitwise as it was, saves and resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megacm3.checkpoint.boxes import Box
from megacm3.checkpoint.reader import Checkpoint
from tests.dist.test_checkpoint import attempt, overrides, run
from tests.dist.test_equality import Layout
from tests.helpers.distributed import run_distributed
from tests.helpers.layouts import ADAM, SGD, Run, batch, compare, compare_curves, micro_batches, reference, start

# Adapters scaled down: with larger steps the run itself doubles any rounding at each step.
LORA = ("train.parameters=lora", "lora.rank=4", "lora.alpha=2", "lora.matrices=[q,k,v,o,gate,up,down]")
# Drawn weights stand for trained ones: where the preset begins with zeros behind an adapter, it would have no gradient.
RELU_LORA = (*LORA[:3], "lora.matrices=[q,v,up,down]", "model.init_residual=scaled")
IMAGE_ROWS = ("train.parameters=image_rows",)
NORMS = ("train.parameters=norms",)
FEW = (
    ("tiny_chameleon_7b", LORA, Layout(2, zero=1, tensor=2, sequence=True, recompute="full")),
    ("tiny_cm3leon", RELU_LORA, Layout(2, zero=0, pipeline=2, micro_batch=1)),
    ("tiny_chameleon_34b", LORA, Layout(2, zero=3, tensor=2)),
    ("tiny_cm3leon", IMAGE_ROWS, Layout(2, zero=1, pipeline=2, micro_batch=1)),
    ("tiny_cm3leon", IMAGE_ROWS, Layout(2, zero=3, tensor=2)),
    ("tiny_chameleon_7b", IMAGE_ROWS, Layout(2, zero=2, tensor=2, sequence=True)),
    ("tiny_chameleon_7b", NORMS, Layout(2, zero=0, tensor=2, sequence=True, micro_batch=4)),
    ("tiny_chameleon_34b", NORMS, Layout(2, zero=1, pipeline=2, micro_batch=1)),
)
MORE = tuple(
    (preset, choice, layout)
    for preset, choice in (
        ("tiny_chameleon_34b", LORA),
        ("tiny_cm3leon", RELU_LORA),
        ("tiny_cm3leon", IMAGE_ROWS),
        ("tiny_chameleon_7b", IMAGE_ROWS),
        ("tiny_chameleon_7b", NORMS),
    )
    for layout in (
        Layout(2, zero=1),
        Layout(2, zero=2, recompute="selective"),
        Layout(2, zero=3, micro_batch=1),
        Layout(2, zero=0, tensor=2),
        Layout(4, zero=2, tensor=2, sequence=True, recompute="full"),
        Layout(4, zero=1, tensor=2, sequence=True, pipeline=2, micro_batch=1),
        Layout(4, zero=0, tensor=2, pipeline=2, micro_batch=1),
        Layout(2, zero="zero3_offload"),
    )
)


def named(case: tuple[str, tuple[str, ...], Layout]) -> str:
    return f"{case[0]}-{case[1][0].split('=')[1]}-{case[2]}"


def image_ids(size: int) -> slice:
    """Those of tests/helpers/layouts.py."""
    return slice(size // 2, 3 * size // 4)


def trains(name: str, choice: str) -> bool:
    """Whether any of a logical tensor trains."""
    if choice == "image_rows":
        return name in ("embed.weight", "head.weight")
    return {"lora": ".lora_", "norms": "norm"}[choice] in name


def assert_frozen(found: Run, choice: str) -> None:
    """Bitwise as it was, but for what trains; and that has moved."""
    for name, before in found.before.items():
        after = found.after[name]
        if not trains(name, choice):
            assert torch.equal(before, after), name
            continue
        assert not torch.equal(before, after), name
        if choice == "image_rows":
            mine = image_ids(len(before))
            assert (before[mine] != after[mine]).any(dim=1).all(), name
            assert torch.equal(before[: mine.start], after[: mine.start]), name
            assert torch.equal(before[mine.stop :], after[mine.stop :]), name


def check(case: tuple[str, tuple[str, ...], Layout]) -> None:
    preset, choice, layout = case
    keys = (*SGD, *choice)
    found, base = layout.run(preset, *keys), reference(f"model.preset={preset}", *keys)
    compare(found, base)
    assert_frozen(found, choice[0].split("=")[1])


@pytest.mark.parametrize("case", FEW, ids=named)
def test_the_same_numbers_in_every_layout(case: tuple[str, tuple[str, ...], Layout]) -> None:
    check(case)


@pytest.mark.long
@pytest.mark.parametrize("case", MORE, ids=named)
def test_the_same_numbers_in_more_layouts(case: tuple[str, tuple[str, ...], Layout]) -> None:
    check(case)


@pytest.mark.parametrize("choice", [LORA, IMAGE_ROWS, NORMS], ids=lambda choice: choice[0].split("=")[1])
def test_weight_decay_and_adam_leave_the_rest_alone(choice: tuple[str, ...]) -> None:
    keys = [f"model.preset=tiny_chameleon_7b", *ADAM, "optimizer.weight_decay=0.5", *choice]
    base = reference(*keys)
    assert_frozen(base, choice[0].split("=")[1])
    compare_curves(Layout(2, zero=1, tensor=2).run("tiny_chameleon_7b", *keys[1:]), base, 1e-5)


SAVED = {
    "lora-zero1-tp2-sequence-bf16": ("tiny_modern", LORA, {"parallel__tensor": 2, "parallel__sequence": "true"}, 1, "bf16"),
    "lora-zero3": ("tiny_chameleon_34b", LORA, {}, 3, "fp32"),
    "lora-zero0-pp2": ("tiny_cm3leon", RELU_LORA, {"parallel__pipeline": 2}, 0, "fp32"),
    "image_rows-zero1-pp2-tied": ("tiny_cm3leon", IMAGE_ROWS, {"parallel__pipeline": 2}, 1, "fp32"),
    "image_rows-zero1-pp2-untied-bf16": ("tiny_modern", IMAGE_ROWS, {"parallel__pipeline": 2}, 1, "bf16"),
    "image_rows-zero2-tp2": ("tiny_modern", IMAGE_ROWS, {"parallel__tensor": 2}, 2, "fp32"),
    "norms-zero0-bf16": ("tiny_chameleon_7b", NORMS, {}, 0, "bf16"),
}


@pytest.mark.parametrize("preset, choice, layout, zero, dtype", SAVED.values(), ids=SAVED.keys())
def test_resume_is_bitwise_and_moments_are_of_what_trains(
    preset: str, choice: tuple[str, ...], layout: dict[str, Any], zero: int, dtype: str, tmp_path: Path
) -> None:
    keys = [*overrides(preset, zero, train__dtype=dtype, **layout), *choice]
    unbroken = run_distributed(run, 2, keys=keys, folder=str(tmp_path / "a"))
    resumed = run_distributed(
        run, 2, keys=keys, folder=str(tmp_path / "b"), load_from=str(tmp_path / "a/step_000002")
    )
    assert [answer["losses"] for answer in resumed] == [answer["losses"][2:] for answer in unbroken]
    last, again = Checkpoint(tmp_path / "a/step_000004"), Checkpoint(tmp_path / "b/step_000004")
    assert last.trained == again.trained and last.trained
    assert_equal_where_trained(last, again)
    first = Checkpoint(tmp_path / "a/step_000002")
    for name, shape in last.shapes.items():
        frozen = not trains(name, choice[0].split("=")[1])
        assert frozen == (name not in last.trained), name
        assert frozen == (not last.boxes("exp_avg", name)), name
        if frozen:
            assert torch.equal(whole_of(first, "param", name), whole_of(last, "param", name)), name


def whole_of(checkpoint: Checkpoint, kind: str, name: str) -> torch.Tensor:
    shape = checkpoint.shapes[name]
    out = torch.empty(shape, dtype=checkpoint.kinds[kind])
    checkpoint.read(kind, name, Box((0,) * len(shape), shape), out)
    return out


def assert_equal_where_trained(first: Checkpoint, second: Checkpoint) -> None:
    assert first.kinds == second.kinds and first.shapes == second.shapes
    for kind in first.kinds:
        for name in first.shapes:
            boxes = [Box.parse(text) for text in first.trained.get(name, [])] if kind != "param" else []
            if kind == "param":
                assert torch.equal(whole_of(first, kind, name), whole_of(second, kind, name)), (kind, name)
            for box in boxes:
                values = [torch.empty(box.shape) for _ in range(2)]
                first.read(kind, name, box, values[0])
                second.read(kind, name, box, values[1])
                assert torch.equal(*values), (kind, name)


def test_a_partial_run_goes_on_in_another_layout(tmp_path: Path) -> None:
    """The tied table's rows move from a pipeline to one process without ZeRO, and to tensor ranks."""
    before = [*overrides("tiny_cm3leon", 1, parallel__pipeline=2), *IMAGE_ROWS]
    unbroken = run_distributed(run, 2, keys=before, folder=str(tmp_path / "a"))
    for world, zero, layout in ((1, 0, {}), (2, 1, {"parallel__tensor": 2})):
        folder = tmp_path / f"b{world}"
        keys = [*overrides("tiny_cm3leon", zero, **layout), *IMAGE_ROWS]
        moved = run_distributed(run, world, keys=keys, folder=str(folder), load_from=str(tmp_path / "a/step_000002"))
        first, second = Checkpoint(tmp_path / "a/step_000002"), Checkpoint(folder / "step_000002")
        assert_equal_where_trained(first, second)
        for (loss, *_), (moved_loss, *_) in zip(unbroken[0]["losses"][2:], moved[0]["losses"], strict=True):
            assert moved_loss == pytest.approx(loss, rel=1e-5)


def test_another_choice_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    keys = [*overrides(), *NORMS]
    run_distributed(run, 1, keys=keys, folder=str(tmp_path), until=2, save_at=(2,))
    said = run_distributed(attempt, 2, keys=overrides(), step_folder=str(tmp_path / "step_000002"))
    assert said[0] == said[1]
    assert "train.parameters = norms" in said[0] and "checkpoint.init" in said[0], said[0]


def held_state(keys: list[str]) -> tuple[int, int, int]:
    """(elements of moments, elements that train, elements of the model) on a rank."""
    from megacm3.checkpoint.state import base_optimizer

    config, context, engine = start(keys)
    engine.train_step(micro_batches(batch(0, config), config, context))
    states = base_optimizer(engine).state.values()
    held = sum(value.numel() for state in states for key, value in state.items() if key == "exp_avg")
    parameters = list(engine.module.parameters())
    return held, sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


@pytest.mark.parametrize("choice", [LORA, IMAGE_ROWS, NORMS], ids=lambda choice: choice[0].split("=")[1])
def test_the_optimizer_holds_state_of_what_trains_alone(choice: tuple[str, ...]) -> None:
    for zero in (0, 1):
        ((held, trained, every),) = run_distributed(held_state, 1, keys=[*overrides(zero=zero), *choice])
        # ZeRO pads its flat groups by a few elements.
        assert trained <= held < trained + 64 and trained < every / 2
