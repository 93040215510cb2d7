"""Small native checkpoints made without an engine."""

from pathlib import Path

import torch

from megacm3.checkpoint.boxes import Box, whole
from megacm3.checkpoint.reader import Checkpoint
from megacm3.checkpoint.reshard import write_checkpoint
from megacm3.config import Config
from megacm3.convert.names import export_kind, names
from megacm3.files import MANIFEST, read_json, write_manifest
from megacm3.resolve import load_config
from megacm3.tokenizers.vocabulary import Vocabulary

KINDS = {"param": torch.bfloat16, "master": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}


def tiny(preset: str, **model: object) -> Config:
    """A preset's twin with some fields changed."""
    return load_config(None, [f"model.preset={preset}", *(f"model.{key}={value}" for key, value in model.items())])


def random_tensors(config: Config) -> dict[tuple[str, str], torch.Tensor]:
    """Every logical tensor of every kind, reproducible; parameters are the rounded masters."""
    generator = torch.Generator().manual_seed(0)
    table = names(export_kind(config.model), config.model)
    tensors = {}
    for name in table:
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            tensors[kind, name.logical] = torch.randn(name.shape, generator=generator)
        tensors["param", name.logical] = tensors["master", name.logical].bfloat16()
    return tensors


def write_random(config: Config, folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Write a checkpoint at a config's layout; return its tensors."""
    tensors = random_tensors(config)

    def read(kind: str, name: str, box: Box, out: torch.Tensor) -> None:
        out.copy_(tensors[kind, name][box.within(whole(tuple(tensors[kind, name].shape)))])

    write_checkpoint(
        folder,
        kinds=KINDS,
        shapes={name: tuple(value.shape) for (kind, name), value in tensors.items() if kind == "param"},
        read=read,
        config=config,
        step=7,
        optimizer_step=7,
        state={"step": 7},
        inputs={},
    )
    return tensors


def assert_holds(folder: Path, tensors: dict[tuple[str, str], torch.Tensor]) -> None:
    """Every tensor reads back whole and bitwise."""
    checkpoint = Checkpoint(folder, verify="sha256")
    checkpoint.check_coverage()
    assert {(kind, name) for kind in checkpoint.kinds for name in checkpoint.shapes} == tensors.keys()
    for (kind, name), wanted in tensors.items():
        out = torch.empty_like(wanted)
        checkpoint.read(kind, name, whole(tuple(wanted.shape)), out)
        assert torch.equal(out, wanted), (kind, name)


def with_vocabulary(native: Path, vocabulary: Vocabulary) -> None:
    """Put a table of ids into a checkpoint, as the trainer saves it."""
    manifest = read_json(native / MANIFEST)
    settings = manifest["settings"] | {"state": {"step": 7, "vocabulary": vocabulary.to_json()}}
    write_manifest(native, "checkpoint", settings, {}, manifest["files"])
