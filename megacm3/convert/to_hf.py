"""A native checkpoint -> a complete Hugging Face folder, streaming, whole or not at all."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megacm3.checkpoint.merged import open_merged
from megacm3.checkpoint.pieces import MASTER, PARAM
from megacm3.checkpoint.reader import Checkpoint
from megacm3.checkpoint.reshard import config_of, find_step
from megacm3.config import Config
from megacm3.convert.card import model_card
from megacm3.convert.carried import ROLES, tokenizers_in
from megacm3.convert.configs import SIDECAR, check_image_map, special_ids, to_hf_config, vocabulary_map
from megacm3.convert.export_weights import EXTRAS, write_weights
from megacm3.convert.names import Name, export_kind, names
from megacm3.convert.tokenizer import write_tokenizer
from megacm3.convert.twin import AUTO_MAP, ship
from megacm3.convert.vq import VqModel
from megacm3.errors import CheckpointError, ConfigError, DataError
from megacm3.files import new_folder, read_manifest, write_json
from megacm3.tokenizers.vocabulary import Vocabulary

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 5_000_000_000
"""Default of the largest shard, transformers' habit."""


@dataclass(frozen=True)
class Export:
    """What is exported: a checkpoint, its table of names, and what stands beside the weights."""

    checkpoint: Checkpoint
    config: Config
    kind: str
    table: list[Name]
    dtype: torch.dtype
    vocabulary: Vocabulary | None
    tokenizers: dict[str, Path]
    """Role (text_tokenizer, image_tokenizer) -> folder, of those that the run had."""
    vq: VqModel | None
    """Image tokenizer inside Chameleon's class; None where there is none, or an import brought its own."""

    @staticmethod
    def of(checkpoint: str | Path, dtype: str = "", tokenizers: dict[str, str] | None = None) -> "Export":
        """Open and check everything but hashes. Raises CheckpointError, ConfigError or DataError."""
        source = open_merged(find_step(checkpoint))
        config = config_of(source.config, 1, 1)
        kind = export_kind(config.model)
        table = names(kind, config.model)
        source.check_tensors({name.logical: name.shape for name in table})
        if dtype and dtype not in DTYPES:
            raise ConfigError(f"--dtype {dtype}; expected one of {', '.join(DTYPES)}")
        wanted = DTYPES[dtype] if dtype else source.kinds[PARAM]
        tree = source.state.get("vocabulary")
        vocabulary = Vocabulary.from_json(tree) if tree else None
        if vocabulary is not None and kind == "chameleon":
            check_image_map(vocabulary, str(source.folder))
        folders = _tokenizers(config, source.folder, tokenizers or {})
        own = kind == "chameleon" and EXTRAS not in source.manifest.files
        vq = _vq(vocabulary, folders.get("image_tokenizer"), source.folder) if own else None
        return Export(source, config, kind, table, wanted, vocabulary, folders, vq)

    @property
    def source_kind(self) -> str:
        """Which of the checkpoint's values are exported: masters where they hold more than the parameters."""
        wide = self.dtype.itemsize > self.checkpoint.kinds[PARAM].itemsize
        return MASTER if wide and MASTER in self.checkpoint.kinds else PARAM


def _tokenizers(config: Config, step: Path, given: dict[str, str]) -> dict[str, Path]:
    """Those that were given, else those that an import left in its step folder, else the run's."""
    found, own = {}, tokenizers_in(step)
    for role in ROLES:
        path = given.get(role) or own.get(role) or getattr(config.data, role)
        if not path:
            log.warning("no %s: the folder will hold weights alone; --%s DIR adds it", role, role.replace("_", "-"))
        elif not given.get(role) and not Path(path).is_dir():
            log.warning("the run's %s %s is gone; --%s DIR adds it", role, path, role.replace("_", "-"))
        else:
            read_manifest(path, role, verify="sha256", error=DataError)
            found[role] = Path(path)
    return found


def _vq(vocabulary: Vocabulary | None, folder: Path | None, where: Path) -> VqModel:
    if vocabulary is None:
        raise CheckpointError(f"{where} knows no vocabulary; config.json of Chameleon's class needs its names and ids")
    found = VqModel.of(folder) if folder else "the run has no image tokenizer"
    if isinstance(found, VqModel):
        return found
    log.warning("the export takes pictures as ids only, its vqmodel is blank: %s", found)
    return VqModel.blank(vocabulary.codebook_size, round(vocabulary.image_tokens**0.5))


def to_hf(
    export: Export,
    output: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
    gate: Callable[[Path], None] = lambda folder: None,
    done: Callable[[int], None] = lambda count: None,
) -> Path:
    """Write the folder; `gate` sees it finished, under a temporary name, and may refuse it by raising.

    replace: an earlier folder of that name gives way once the new one is whole.
    """
    with new_folder(output, replace=replace) as folder:
        with export.checkpoint.hashed_meanwhile() as verdict:
            write_weights(export, folder, shard_bytes, done)
            verdict()
        _write_configs(export, folder)
        for role, path in export.tokenizers.items():
            shutil.copytree(path, folder / role)
        (folder / "README.md").write_text(model_card(export), encoding="utf-8")
        gate(folder)
    return Path(output)


def _write_configs(export: Export, folder: Path) -> None:
    dtype = {value: name for name, value in DTYPES.items()}[export.dtype]
    ids = special_ids(export.vocabulary)
    tree = to_hf_config(export.kind, export.config.model, ids, dtype)
    original = (export.checkpoint.state.get("hf") or {}).get("config", {})
    if export.vq is not None and export.vocabulary is not None:
        tree |= {"vq_config": export.vq.config, "vocabulary_map": vocabulary_map(export.vocabulary)}
    if export.kind == "chameleon":
        tree["auto_map"] = AUTO_MAP
        ship(folder)
    # Weights that were imported and not trained since keep their folder's own words.
    tree |= {key: value for key, value in original.items() if key != "dtype"}
    write_json(folder / "config.json", tree)
    write_json(
        folder / "generation_config.json", {name: i for name, i in ids.items() if i is not None} | {"do_sample": True}
    )
    if export.vocabulary is None:
        log.warning("the checkpoint knows no vocabulary: %s is left out, tools/generate.py needs it", SIDECAR)
        return
    sidecar = _sidecar(export, export.vocabulary)
    write_json(folder / SIDECAR, sidecar)
    text = export.tokenizers.get("text_tokenizer")
    if text is not None:
        write_tokenizer(folder, text, export.vocabulary, export.config.model.sequence_length, sidecar["image_size"])


def _sidecar(export: Export, vocabulary: Vocabulary) -> dict[str, Any]:
    side = round(vocabulary.image_tokens**0.5)
    size, grid = 0, [side, vocabulary.image_tokens // side]
    fingerprints = {}
    for role, path in export.tokenizers.items():
        manifest = read_manifest(path, role)
        fingerprints[role] = manifest.fingerprint
        if role == "image_tokenizer":
            size, grid = manifest.settings["image_size"], list(manifest.settings["grid"])
    state = export.checkpoint.state
    stream = state.get("stream") or {}
    stores = [source["store"] for source in stream.get("stores", [])]
    return {
        "format": 1,
        "family": vocabulary.family,
        "vocabulary": vocabulary.to_json(),
        "image_size": size,
        "grid": grid,
        "sequence_length": export.config.model.sequence_length,
        # An import says what its folder said; a run what it was trained on.
        "answers": bool(state.get("answers", (stream.get("settings") or {}).get("answers_only", False))),
        "source": {
            "checkpoint": export.checkpoint.manifest.fingerprint,
            "step": export.checkpoint.step,
            "stores": stores,
            **fingerprints,
        },
    }
