"""One folder of each Hugging Face class, made by transformers itself."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megacm3.convert.from_hf import from_hf, opened
from tests.helpers import tiny_models

KINDS = ("opt", "llama", "qwen3", "chameleon", "swin")
VOCABULARY = 300


def build(kind: str) -> torch.nn.Module:
    """The class's tiny model with random weights."""
    if kind == "opt":
        return tiny_models.opt_model(VOCABULARY)
    if kind in ("llama", "qwen3"):
        return tiny_models.llama_model(kind, VOCABULARY)
    return tiny_models.chameleon_model(kind == "swin")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind -> a folder that nobody may change."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            build(kind).save_pretrained(made[kind])  # type: ignore[operator]
        return made[kind]

    return folder


@pytest.fixture
def copy(folders: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Kind -> a folder of the test's own."""

    def folder(kind: str) -> Path:
        return Path(shutil.copytree(folders(kind), tmp_path / f"{kind}-copy"))

    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_byte_equal(first: Path, second: Path) -> None:
    """Names, shapes, dtypes and bytes of every tensor."""
    a, b = tensors(first), tensors(second)
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype and value.shape == b[name].shape, name
        assert torch.equal(value.view(torch.uint8), b[name].view(torch.uint8)), name


def import_hf(folder: Path, output: Path, tensor: int = 1, pipeline: int = 1, **options: int) -> Path:
    """As the command does, without its gate."""
    with opened(folder, output, **options) as source:  # type: ignore[arg-type]
        return from_hf(source, output, tensor, pipeline)
