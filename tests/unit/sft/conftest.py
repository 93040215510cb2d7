"""Small real tokenizers of both families, shared by the room's tests."""

from pathlib import Path

import pytest
import torch

from megacm3.tokenizers.chameleon_text import train_chameleon
from megacm3.tokenizers.image import ImageTokenizer, save_image_tokenizer
from megacm3.tokenizers.image_config import NetworkConfig
from megacm3.tokenizers.image_network import build_network
from megacm3.tokenizers.text import TextTokenizer, save_chameleon, train_text_tokenizer

SMALL = NetworkConfig(
    image_size=32, channels=[8, 8, 16], layers_per_block=1, latent_channels=8, codebook_size=64, code_dim=8,
    norm_groups=4, middle_attention=False,
)  # fmt: skip
TEXTS = [
    "Question: What is the man by the bags awaiting? The answer is a cab.",
    "Describe the given picture. A woman eats an apple near a tree.",
    "Edit first image following the instruction make it red",
]


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text (CM3Leon's), chameleon (text) and image."""
    folder = tmp_path_factory.mktemp("tokenizers")
    train_text_tokenizer(TEXTS * 5, 400, folder / "text")
    trained = train_chameleon(TEXTS * 5, 9000)
    save_chameleon(trained, 9000, folder / "chameleon", settings={}, inputs={}, overwrite=False)
    torch.manual_seed(0)
    network = build_network(SMALL)
    torch.nn.init.normal_(network.quantize.embedding.weight)
    save_image_tokenizer(network, SMALL.image_size, folder / "image")
    return folder


@pytest.fixture(scope="session")
def text(tokenizers: Path) -> TextTokenizer:
    return TextTokenizer.load(tokenizers / "text")


@pytest.fixture(scope="session")
def chameleon_text(tokenizers: Path) -> TextTokenizer:
    return TextTokenizer.load(tokenizers / "chameleon")


@pytest.fixture(scope="session")
def image(tokenizers: Path) -> ImageTokenizer:
    return ImageTokenizer.load(tokenizers / "image")
