"""Tiny exports for the decoder's tests."""

from pathlib import Path

import numpy as np
import pytest

from megacm3.tokenizers.vocabulary import Vocabulary
from tests.helpers import tiny_models


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    """320 text ids, 32 codes, 24 specials, 16 codes a picture."""
    return tiny_models.tiny_vocabulary()


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory) -> Path:
    """A cm3leon export with both tokenizers."""
    return tiny_models.save_export(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="session")
def generator(hf_folder):
    """The export, loaded."""
    from megacm3.inference.api import Generator

    return Generator.load(hf_folder)


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    """Two pictures uint8 [2, 32, 32, 3]."""
    return np.random.default_rng(0).integers(0, 256, (2, tiny_models.PIXELS, tiny_models.PIXELS, 3), np.uint8)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict:
    """name -> (transformers model, its saved folder), one for each family and variant that the decoder runs."""
    made = {
        "opt": tiny_models.opt_model(384),
        "llama": tiny_models.llama_model("llama", 384),
        "qwen3": tiny_models.llama_model("qwen3", 384),
        "chameleon": tiny_models.chameleon_model(swin=False),
        "chameleon-swin": tiny_models.chameleon_model(swin=True),
    }
    root = tmp_path_factory.mktemp("models")
    for name, model in made.items():
        model.save_pretrained(root / name)
    return {name: (model, root / name) for name, model in made.items()}
