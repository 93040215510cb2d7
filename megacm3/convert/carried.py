"""Tokenizers that come along with weights: an import keeps them inside its step folder, for the export that follows."""

import logging
import shutil
from pathlib import Path

from megacm3.convert.unpickle import unpickle
from megacm3.errors import CheckpointError, DataError
from megacm3.files import MANIFEST, read_manifest, sha256_file

log = logging.getLogger(__name__)
ROLES = ("text_tokenizer", "image_tokenizer")


def tokenizers_in(folder: Path) -> dict[str, Path]:
    """Role -> folder of our tokenizers in an export or a step folder. Raises CheckpointError for damaged ones."""
    found = {role: folder / role for role in ROLES if (folder / role / MANIFEST).is_file()}
    for role, path in found.items():
        read_manifest(path, role, verify="sha256", error=CheckpointError)
    return found


def tokenizers_of_release(folder: Path, vocab_size: int, scratch: Path) -> dict[str, Path]:
    """Meta's `tokenizer` folder (text_tokenizer.json, vqgan.yaml, vqgan.ckpt) as ours, below `scratch`.

    vqgan.ckpt is a pickle; the caller asked whether it is trusted. Raises ConfigError or DataError for a file that does
    not fit.
    """
    from megacm3.tokenizers.chameleon_text import read_released
    from megacm3.tokenizers.image import save_image_tokenizer
    from megacm3.tokenizers.taming import read_network_config, read_weights, to_vqmodel
    from megacm3.tokenizers.text import save_chameleon

    found = {}
    text, config, weights = (folder / name for name in ("text_tokenizer.json", "vqgan.yaml", "vqgan.ckpt"))
    if text.is_file():
        try:
            tree = read_released(text)
        except DataError as fault:
            log.warning("the text tokenizer does not come along: %s", fault)
        else:
            found["text_tokenizer"] = scratch / "text_tokenizer"
            inputs = {"json": sha256_file(text)}
            save_chameleon(tree, vocab_size, found["text_tokenizer"], settings={}, inputs=inputs, overwrite=False)
    if weights.is_file() and not config.is_file():
        raise DataError(f"{weights} has no {config.name} beside it, which says what network it is")
    if weights.is_file():
        unpickle(weights, scratch / "vqgan.safetensors")
        network_config = read_network_config(config)
        network = to_vqmodel(read_weights(scratch / "vqgan.safetensors"), network_config)
        found["image_tokenizer"] = scratch / "image_tokenizer"
        inputs = {"weights": sha256_file(weights)}
        save_image_tokenizer(network, network_config.image_size, found["image_tokenizer"], inputs=inputs)
    return found


def keep(tokenizers: dict[str, Path], folder: Path) -> None:
    """Copy tokenizers into a step folder; its manifest hashes them with the rest."""
    for role, path in tokenizers.items():
        shutil.copytree(path, folder / role)
