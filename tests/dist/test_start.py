"""checkpoint.init: a run begins with the weights of a checkpoint or of a Hugging Face folder, in any layout."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megacm3.checkpoint.boxes import whole
from megacm3.checkpoint.reader import Checkpoint
from megacm3.convert.to_hf import Export, to_hf
from tests.helpers.distributed import ROOT, RankError, run_distributed
from tests.helpers.stores import make_store

CODEBOOK, TEXT = 128, 256


def keys(preset: str, store: Path, out: Path, zero: int = 1, **more: Any) -> list[str]:
    """A small run over a store."""
    sizes = [f"model.preset={preset}", "model.vocab_size=448", "model.sequence_length=64", "objective.sentinels=16"]
    data = [f"data.mixture=[{{store: {store}}}]", "data.packing=whole", "data.workers=0"]
    train = ["train.steps=2", "train.micro_batch=1", "train.global_batch=2", "train.dtype=fp32", f"train.out={out}"]
    rest = ["optimizer.lr=1e-2", "log.tensorboard=false", "log.every=1", f"deepspeed={ROOT}/ds_configs/zero{zero}.json"]
    return [*sizes, *data, *train, *rest, *(f"{key.replace('__', '.')}={value}" for key, value in more.items())]


def begin(overrides: list[str], steps: int = 0) -> dict[str, Any]:
    """What the trainer does until its first step; then `steps` steps and a save."""
    import logging

    import deepspeed

    from megacm3.checkpoint.store import save
    from megacm3.parallel.context import build_context
    from megacm3.parallel.cpu import choose_device, prepare
    from megacm3.resolve import load_config
    from megacm3.training.loop import train
    from megacm3.training.run import build_run
    from megacm3.training.watchdog import Watchdog

    prepare(choose_device("cpu"))
    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.init_distributed("gloo")
    config = load_config(None, overrides)
    context = build_context(config, choose_device("cpu"))
    run = build_run(config, context, Watchdog(config, context))
    run.resume()
    at = run.step
    if steps:
        train(run)
    else:
        save(run.engine, run.context, run.out / "checkpoints", at, {"step": at}, 0)
    return {"step": at, "init": run.init}


def parameters(step: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(step, verify="sha256")
    found = {}
    for name, shape in checkpoint.shapes.items():
        found[name] = torch.empty(shape, dtype=checkpoint.kinds["param"])
        checkpoint.read("param", name, whole(shape), found[name])
    return found


def assert_begins_with(step: Path, source: Path) -> None:
    """Bitwise the source's weights, no moments; adapters, where there are any, beside them."""
    found, wanted = parameters(step), parameters(source)
    checkpoint = Checkpoint(step)
    assert checkpoint.step == 0 and checkpoint.optimizer_step == 0 and "exp_avg" not in checkpoint.kinds
    assert {name for name in found if ".lora_" not in name} == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name].to(value.dtype), value), name


Source = tuple[str, Path, Path, Path]


@pytest.fixture(scope="module", params=["tiny_cm3leon", "tiny_modern"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    """(preset, store, a run's step after two steps, its export)."""
    folder = tmp_path_factory.mktemp(request.param)
    store = make_store(folder / "store", documents=16, text_size=TEXT, codebook_size=CODEBOOK, image_tokens=16)
    run_distributed(begin, 1, overrides=keys(request.param, store, folder / "base"), steps=2)
    step = folder / "base/checkpoints/step_000002"
    to_hf(Export.of(step), folder / "hf")
    yield request.param, store, step, folder / "hf"


LAYOUTS = {
    "tp2": (2, 1, {"parallel__tensor": 2}),
    "zero1-dp2": (2, 1, {}),
    "zero2-dp2": (2, 2, {}),
    "zero3-dp2": (2, 3, {}),
    "pp2": (2, 1, {"parallel__pipeline": 2}),
    "zero0": (1, 0, {}),
}


@pytest.mark.parametrize("world, zero, layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_begins_with_the_weights(
    world: int, zero: int, layout: dict[str, Any], source: Source, tmp_path: Path
) -> None:
    preset, store, step, hf = source
    for name, init in (("native", step.parent.parent), ("hf", hf)):
        out = tmp_path / name
        answers = run_distributed(
            begin, world, overrides=keys(preset, store, out, zero, checkpoint__init=init, **layout)
        )
        assert [answer["step"] for answer in answers] == [0] * world
        fingerprint = Checkpoint(step).manifest.fingerprint
        assert all(answer["init"]["fingerprint"] == fingerprint for answer in answers)
        assert_begins_with(out / "checkpoints/step_000000", step)


def test_resuming_goes_before_init_and_bf16_and_adapters_begin_too(source: Source, tmp_path: Path) -> None:
    preset, store, step, hf = source
    lora = {"train__parameters": "lora", "lora__rank": 2, "lora__matrices": "[q,down]"}
    overrides = keys(preset, store, tmp_path / "tuned", checkpoint__init=hf, train__dtype="bf16", **lora)
    (first,) = run_distributed(begin, 1, overrides=[*overrides, "train.stop_at=1"], steps=1)
    begun = Checkpoint(tmp_path / "tuned/checkpoints/step_000001")
    (again,) = run_distributed(begin, 1, overrides=overrides, steps=2)
    assert (first["step"], again["step"]) == (0, 1) and again["init"] == first["init"]
    base = parameters(step)
    for path in (begun.folder, tmp_path / "tuned/checkpoints/step_000002"):
        tuned = parameters(path)
        assert all(torch.equal(tuned[name], value.bfloat16()) for name, value in base.items())
    # Begun anew from the tuned run: the adapters are merged into what it starts with.
    merged = keys(preset, store, tmp_path / "merged", checkpoint__init=tmp_path / "tuned")
    run_distributed(begin, 1, overrides=merged)
    found = parameters(tmp_path / "merged/checkpoints/step_000000")
    a, b = (tuned[f"layers.0.attn.q.lora_{end}"].float() for end in "ab")
    expected = base["layers.0.attn.q.weight"].bfloat16().float()
    change = found["layers.0.attn.q.weight"] - expected
    assert change.norm() > 0
    # The masters of the factors are finer than the bf16 values that this sum is made of.
    assert (change - 16.0 * b @ a).norm() < 0.02 * change.norm()


def test_another_model_is_refused_on_every_rank(source: Source, tmp_path: Path) -> None:
    preset, store, step, _ = source
    overrides = keys(preset, store, tmp_path / "out", checkpoint__init=step, model__layers=2)
    with pytest.raises(RankError) as caught:
        run_distributed(begin, 2, overrides=overrides)
    assert str(caught.value).count("set model.layers=4") >= 2, str(caught.value)
