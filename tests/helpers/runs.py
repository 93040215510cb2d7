"""The trainer itself on forked ranks: `train_ranks(...)` is a launch, `curve` what it left."""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megacm3.errors import Megacm3Error
from megacm3.faults import VARIABLE
from tests.helpers.distributed import ROOT, run_distributed
from tests.helpers.stores import make_store
from tests.helpers.tools import run_tool


@dataclass(frozen=True)
class Outcome:
    """How a rank left."""

    code: int
    error: str
    """The line that a user would see; "" after success."""
    log: str


def write_config(folder: Path, **changes: str) -> Path:
    """A store of 64 small documents and a config over it: 8 steps of 8 sequences, saved every second one, with dropout,
    recompute and CM3 masks. changes: other sections of the YAML, by name.
    """
    store = make_store(folder / "store", documents=64, text_size=256, codebook_size=128, image_tokens=16)
    sections = {
        "model": "{preset: tiny_modern, layers: 2, dropout: 0.1, vocab_size: 512, sequence_length: 96}",
        "deepspeed": f"{ROOT}/ds_configs/zero1.json",
        "parallel": "{recompute: full}",
        "data": f"{{mixture: [{{store: {store}}}], packing: whole, workers: 0}}",
        "optimizer": "{lr: 1.0e-2, schedule: {warmup: 2}}",
        "train": "{steps: 8, micro_batch: 2, global_batch: 8, dtype: fp32, device: cpu}",
        "retrieval": "{documents: [1, 0, 0, 0]}",
        "checkpoint": "{every: 2, keep: 0}",
        "log": "{every: 1, tensorboard: false}",
    }
    path = folder / "config.yaml"
    path.write_text("".join(f"{name}: {text}\n" for name, text in (sections | changes).items()), encoding="utf-8")
    return path


def trained(arguments: list[str], fault: str) -> Outcome:
    """What a rank does: the trainer's `main`, its error caught as its command would."""
    from megacm3.train import main

    os.environ[VARIABLE] = fault
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megacm3").addHandler(handler)
    logging.getLogger("megacm3").setLevel(logging.INFO)
    torch.set_num_threads(1)
    try:
        code, error = main(arguments), ""
    except Megacm3Error as fault_met:
        code, error = fault_met.exit_code, str(fault_met)
    return Outcome(code or 0, error, "\n".join(lines))


def train_ranks(
    config: Path, out: Path, *overrides: str, ranks: int = 2, fault: str = "", timeout: float = 100.0
) -> list[Outcome]:
    """Launch the trainer. Raises RankError when a rank is killed (as by a fault `...:kill9`) or hangs."""
    arguments = [str(config), f"train.out={out}", *overrides]
    return run_distributed(trained, ranks, timeout=timeout, arguments=arguments, fault=fault)


def tool(name: str, arguments: list[str], fault: str) -> tuple[int, str]:
    """A command of tools/ on a forked rank, which a fault may kill. It stands here and not in the test's module: the
    process that forks must not import what the tool does.
    """
    os.environ[VARIABLE] = fault
    return run_tool(name, *arguments)


def finished(outcomes: list[Outcome]) -> None:
    """Assert that every rank ended well."""
    assert [outcome.code for outcome in outcomes] == [0] * len(outcomes), outcomes


def lines(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curve(out: Path) -> list[tuple[Any, ...]]:
    """Step, losses, gradient norm and samples of every logged step: equal for runs that are the same run."""
    return [
        (line["step"], line["loss"], line["loss_position"], line["grad_norm"], line["samples"]) for line in lines(out)
    ]


def parameters(step: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every logical tensor of a checkpoint, whole, by kind and name."""
    from megacm3.checkpoint.boxes import whole
    from megacm3.checkpoint.reader import Checkpoint

    checkpoint, tensors = Checkpoint(step, verify="sha256"), {}
    for kind, dtype in checkpoint.kinds.items():
        for name, shape in checkpoint.shapes.items():
            tensors[kind, name] = torch.empty(shape, dtype=dtype)
            checkpoint.read(kind, name, whole(shape), tensors[kind, name])
    return tensors


def differing(first: Path, second: Path) -> list[tuple[str, str]]:
    """Tensors of two checkpoints that are not bitwise equal."""
    a, b = parameters(first), parameters(second)
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]
