"""Trains a few steps in a given layout and returns everything in logical, layout-free form, to be compared.

`trained(...)` runs in the test process and starts the ranks; `steps(...)` is what each rank does.
"""

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.helpers.distributed import ROOT, run_distributed

STEPS = 5
# Weights wide enough that attention is not uniform, steps large enough that updates stand out of fp32 rounding.
_COMMON = ("optimizer.clip=0.5", "train.micro_batch=2", "model.init_std=0.1")
SGD = ("optimizer.kind=sgd", "optimizer.lr=3", "optimizer.weight_decay=0", *_COMMON)
ADAM = ("optimizer.kind=adamw", "optimizer.lr=1e-3", "optimizer.weight_decay=0.1", *_COMMON)


@dataclass
class Run:
    """What a few steps gave."""

    losses: list[float]
    norms: list[float]
    output_norms: list[float]
    before: dict[str, torch.Tensor]
    """Logical tensors as initialised."""
    after: dict[str, torch.Tensor]
    differing: str
    """What `check_replicas` says after the last step; empty = nothing."""
    copies: list[str]
    """Logical tensors of which two ranks hold different copies of the same numbers after the last step."""


def batch(step: int, config: Any) -> list[dict[str, torch.Tensor]]:
    """The step's sequences, one dict of one row each: uneven numbers of targets, several documents."""
    generator = torch.Generator().manual_seed(1000 + step)
    length, rows = config.model.sequence_length, []
    for row in range(config.train.global_batch):
        ids = _ids(length + 1, config.model.vocab_size, generator)
        targets = ids[:, 1:].clone()
        targets[:, : 3 * row + step] = -100
        documents = (torch.arange(length) // (length // 3 + row + 1)).to(torch.int32)[None]
        number = torch.tensor([step * config.train.global_batch + row])
        rows.append({"tokens": ids[:, :-1], "targets": targets, "documents": documents, "numbers": number})
    return rows


def _ids(length: int, size: int, generator: torch.Generator) -> torch.Tensor:
    # Something to learn, so that updates of all steps point the same way and stand out of fp32 rounding.
    ids = torch.randint(0, size, (1, length), generator=generator)
    for place in range(1, length):
        if place % 4:
            ids[0, place] = (5 * ids[0, place - 1] + 3) % size
    return ids


def micro_batches(rows: list[dict[str, torch.Tensor]], config: Any, context: Any) -> list[dict[str, torch.Tensor]]:
    """This rank's share of the step's rows in micro-batches, as data/loader.py cuts them."""
    share = len(rows) // context.data
    mine = rows[context.data_rank * share : (context.data_rank + 1) * share]
    size = config.train.micro_batch
    return [
        {key: torch.cat([row[key] for row in mine[low : low + size]]) for key in mine[0]}
        for low in range(0, len(mine), size)
    ]


def kinds(config: Any) -> torch.Tensor:
    """Text ids, then a quarter of image ids, then a few special ones."""
    size = config.model.vocab_size
    kind = torch.zeros(size, dtype=torch.uint8)
    kind[size // 2 : 3 * size // 4] = 1
    kind[3 * size // 4 :] = 2
    return kind


def start(overrides: list[str]) -> tuple[Any, Any, Any]:
    """(config, context, Engine) on a rank of the pool."""
    from megacm3.parallel.cpu import choose_device, prepare
    from megacm3.resolve import load_config

    device = choose_device("cpu")
    prepare(device)
    import logging

    import deepspeed

    from megacm3.parallel.context import build_context
    from megacm3.parallel.engine import Engine

    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.init_distributed("gloo")
    config = load_config(None, overrides)
    context = build_context(config, device)
    return config, context, Engine(config, context, kinds(config))


def boxes(engine: Any) -> list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]:
    """(name, global shape, offset, values) of every part that this rank holds, ZeRO-3 parameters gathered."""
    import deepspeed

    from megacm3.parallel.parts import parts_of

    held = []
    for parameter in engine.module.parameters():
        partitioned = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], enabled=partitioned):
            for part in parts_of(parameter):
                value = parameter.detach()[part.start : part.start + part.shape[0]].float().clone()
                held.append((part.name, part.global_shape, part.offset, value))
    return held


def steps(overrides: list[str], fault: str = "", keep: bool = True) -> dict[str, Any]:
    """What one rank does: `STEPS` steps, with the boxes it held before and after. `fault` puts a known one back."""
    from tests.helpers import faults

    faults.put_back(fault)
    config, context, engine = start(overrides)
    losses, norms, outputs = [], [], []
    before = boxes(engine) if keep else []
    for step in range(STEPS):
        result = engine.train_step(micro_batches(batch(step, config), config, context))
        losses.append(float(result.sums[0] / result.sums[3]))
        norms.append(result.grad_norm)
        outputs.append(result.output_norm)
    after = boxes(engine) if keep else []
    return {
        "losses": losses,
        "norms": norms,
        "outputs": outputs,
        "before": before,
        "after": after,
        "differing": _differing(engine, context),
    }


def _differing(engine: Any, context: Any) -> str:
    from megacm3.errors import CheckpointError
    from megacm3.parallel.replicated import check_replicas

    try:
        check_replicas(engine.module, context)
    except CheckpointError as error:
        return str(error)
    return ""


def whole(answers: list[dict[str, Any]], key: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(logical tensors put together from all ranks' boxes, names of those with copies that are not the same)."""
    tensors: dict[str, torch.Tensor] = {}
    differing = []
    for answer in answers:
        for name, shape, offset, value in answer[key]:
            tensor = tensors.setdefault(name, torch.full(shape, float("nan")))
            place = tuple(slice(o, o + n) for o, n in zip(offset, value.shape, strict=True))
            known = ~tensor[place].isnan()
            if not torch.equal(tensor[place][known], value[known]):
                differing.append(name)
            tensor[place] = value
    assert all(not tensor.isnan().any() for tensor in tensors.values()), "a box of a tensor is on no rank"
    return tensors, differing


def path_of(zero: int | str) -> Path:
    """The file of ds_configs/ for a ZeRO stage, or of that name."""
    return ROOT / "ds_configs" / (f"zero{zero}.json" if isinstance(zero, int) else f"{zero}.json")


def trained(
    world: int, overrides: list[str], *, zero: int | str = 1, ds: dict[str, Any] | None = None, fault: str = ""
) -> Run:
    """`STEPS` steps on `world` ranks. ds: keys put over the ZeRO stage's JSON."""
    path = path_of(zero)
    with tempfile.TemporaryDirectory() as folder:
        if ds:
            path = _merged(path, ds, Path(folder))
        answers = run_distributed(steps, world, timeout=240, overrides=[*overrides, f"deepspeed={path}"], fault=fault)
    first = answers[0]
    for answer in answers[1:]:
        assert answer["losses"] == first["losses"], "ranks report different losses"
    after, copies = whole(answers, "after")
    return Run(
        losses=first["losses"],
        norms=first["norms"],
        output_norms=first["outputs"],
        before=whole(answers, "before")[0],
        after=after,
        differing=first["differing"],
        copies=copies,
    )


def _merged(path: Path, ds: dict[str, Any], folder: Path) -> Path:
    tree = json.loads(path.read_text())
    for key, value in ds.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    merged = folder / "ds.json"
    merged.write_text(json.dumps(tree))
    return merged


@functools.cache
def reference(*overrides: str) -> Run:
    """The same steps in one process, without ZeRO; made once for all comparisons."""
    return trained(1, list(overrides), zero=0)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm of `b`."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def compare(run: Run, base: Run) -> None:
    """SGD in fp32: loss 1e-6, gradient norm 1e-5, each tensor's update 1e-4, relative; no replica differs."""
    assert run.differing == "", run.differing
    assert not run.copies, f"copies differ: {run.copies}"
    for name, start_value in base.before.items():
        assert torch.equal(run.before[name], start_value), f"{name} starts different"
    compare_curves(run, base)
    assert run.norms == _near(base.norms, 1e-5), (run.norms, base.norms)
    assert set(run.after) == set(base.after)
    for name in base.after:
        update, expected = run.after[name] - run.before[name], base.after[name] - base.before[name]
        error = relative(update, expected)
        assert error < 1e-4, f"the update of {name} is off by {error:.2e}"


def compare_curves(run: Run, base: Run, tolerance: float = 1e-6) -> None:
    """Losses, and the last block's output, within a relative tolerance."""
    assert run.losses == _near(base.losses, tolerance), (run.losses, base.losses)
    assert run.output_norms == _near(base.output_norms, 10 * tolerance), (run.output_norms, base.output_norms)


def _near(values: list[float], relative_tolerance: float) -> Any:
    import pytest

    return pytest.approx(values, rel=relative_tolerance, abs=0)
