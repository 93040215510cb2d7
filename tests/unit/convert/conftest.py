"""One folder of each Hugging Face class, made by transformers itself."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megacm3.convert.from_hf import from_hf, opened
from megacm3.convert.to_hf import Export, to_hf
from megacm3.tokenizers.vocabulary import Vocabulary
from tests.helpers import tiny_models
from tests.helpers.checkpoints import tiny, with_vocabulary, write_random

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


def exported(folder: Path, output: Path) -> Path:
    """A folder's weights exported again, by way of a native checkpoint: `output`/hf."""
    return to_hf(Export.of(import_hf(folder, output / "native")), output / "hf")


def export_with_tokenizers(output: Path, preset: str = "tiny_cm3leon", **model: object) -> Path:
    """A random model's whole export, tokenizers inside: `output`/hf."""
    output.mkdir(exist_ok=True)
    tiny_models.save_tokenizers(output, 320)
    write_random(tiny(preset, vocab_size=512, **model), output / "native")
    with_vocabulary(output / "native", Vocabulary.cm3leon(320, 32, 160, sentinels=64, image_tokens=16))
    folders = {role: str(output / role) for role in ("text_tokenizer", "image_tokenizer")}
    return to_hf(Export.of(output / "native", "float32", folders), output / "hf")
