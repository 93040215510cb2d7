"""A native checkpoint -> a complete Hugging Face folder, streaming, whole or not at all."""

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megacm3.checkpoint.boxes import Box, whole
from megacm3.checkpoint.pieces import MASTER, PARAM
from megacm3.checkpoint.reader import Checkpoint
from megacm3.checkpoint.reshard import config_of, find_step, row_chunks
from megacm3.checkpoint.tensors import CODES, Entry, OpenFiles, read_header, write_tensors
from megacm3.config import Config
from megacm3.convert.card import model_card
from megacm3.convert.configs import SIDECAR, special_ids, to_hf_config, vocabulary_map
from megacm3.convert.folder import INDEX, SINGLE
from megacm3.convert.from_hf import EXTRAS
from megacm3.convert.names import OPT_OFFSET, Name, export_kind, head_rows, names
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

    @staticmethod
    def of(checkpoint: str | Path, dtype: str = "", tokenizers: dict[str, str] | None = None) -> "Export":
        """Open and check everything. Raises CheckpointError, ConfigError or DataError before anything is written."""
        source = Checkpoint(find_step(checkpoint), verify="sha256")
        config = config_of(source.config, 1, 1)
        kind = export_kind(config.model)
        table = names(kind, config.model)
        source.check_tensors({name.logical: name.shape for name in table})
        if dtype and dtype not in DTYPES:
            raise ConfigError(f"--dtype {dtype}; expected one of {', '.join(DTYPES)}")
        wanted = DTYPES[dtype] if dtype else source.kinds[PARAM]
        tree = source.state.get("vocabulary")
        vocabulary = Vocabulary.from_json(tree) if tree else None
        return Export(source, config, kind, table, wanted, vocabulary, _tokenizers(config, tokenizers or {}))

    @property
    def source_kind(self) -> str:
        """Which of the checkpoint's values are exported: masters where they hold more than the parameters."""
        wide = self.dtype.itemsize > self.checkpoint.kinds[PARAM].itemsize
        return MASTER if wide and MASTER in self.checkpoint.kinds else PARAM


def _tokenizers(config: Config, given: dict[str, str]) -> dict[str, Path]:
    found = {}
    for role in ("text_tokenizer", "image_tokenizer"):
        path = given.get(role) or getattr(config.data, role)
        if not path:
            log.warning("no %s: the folder will hold weights alone; --%s DIR adds it", role, role.replace("_", "-"))
        elif not given.get(role) and not Path(path).is_dir():
            log.warning("the run's %s %s is gone; --%s DIR adds it", role, path, role.replace("_", "-"))
        else:
            read_manifest(path, role, verify="sha256", error=DataError)
            found[role] = Path(path)
    return found


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
        _write_weights(export, folder, shard_bytes, done)
        _write_configs(export, folder)
        for role, path in export.tokenizers.items():
            shutil.copytree(path, folder / role)
        (folder / "README.md").write_text(model_card(export), encoding="utf-8")
        gate(folder)
    return Path(output)


def _entries(export: Export) -> tuple[list[Entry], dict[str, Name], dict[str, tuple[Any, Any]]]:
    entries = [Entry(name.hf, export.dtype, name.hf_shape) for name in export.table]
    extras = {}
    path = export.checkpoint.folder / EXTRAS
    if EXTRAS in export.checkpoint.manifest.files:
        by_hf = {name.hf for name in export.table}
        for key, entry in read_header(path).items():
            extras[key] = (entry["dtype"], tuple(entry["shape"]))
        codes = {code: dtype for dtype, code in CODES.items()}
        entries += [Entry(key, codes[code], shape) for key, (code, shape) in extras.items() if key not in by_hf]
    return entries, {name.hf: name for name in export.table}, extras


def shards(entries: list[Entry], limit: int) -> list[list[Entry]]:
    """Entries in order, cut so that no shard is larger than `limit` bytes where more than one tensor lies in it."""
    cut: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if cut[-1] and size + entry.bytes > limit:
            cut.append([])
            size = 0
        cut[-1].append(entry)
        size += entry.bytes
    return cut


def _write_weights(export: Export, folder: Path, shard_bytes: int, done: Callable[[int], None]) -> None:
    entries, table, extras = _entries(export)
    extra_files = OpenFiles(export.checkpoint.folder)

    def values(entry: Entry) -> Iterator[torch.Tensor]:
        name = table.get(entry.key)
        if name is None:
            yield extra_files.slice(EXTRAS, entry.key, whole(entry.shape).within(whole(entry.shape)))
        elif name.form == "positions":
            if entry.key in extras and extras[entry.key][0] == CODES[entry.dtype]:
                yield extra_files.slice(EXTRAS, entry.key, (slice(0, OPT_OFFSET), slice(None)))
            else:
                yield torch.zeros(OPT_OFFSET, entry.shape[1], dtype=entry.dtype)
            yield from _read(export, name.logical, whole(name.shape))
        elif name.form == "heads":
            (rows,) = _read(export, name.logical, whole(name.shape))
            yield rows[head_rows(name.shape[0], name.heads)]
        else:
            yield from _read(export, name.logical, whole(name.shape))

    cut = shards(entries, shard_bytes)
    files = [SINGLE] if len(cut) == 1 else [f"model-{i + 1:05d}-of-{len(cut):05d}.safetensors" for i in range(len(cut))]
    for file, part in zip(files, cut, strict=True):
        write_tensors(folder / file, sorted(part, key=lambda e: -e.dtype.itemsize), {"format": "pt"}, values, done)
    if len(cut) > 1:
        places = {entry.key: file for file, part in zip(files, cut, strict=True) for entry in part}
        size = sum(entry.bytes for entry in entries)
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})


def _read(export: Export, name: str, box: Box) -> Iterator[torch.Tensor]:
    for chunk in row_chunks(box, export.dtype):
        out = torch.empty(chunk.shape, dtype=export.dtype)
        export.checkpoint.read(export.source_kind, name, chunk, out)
        yield out


def _write_configs(export: Export, folder: Path) -> None:
    dtype = {value: name for name, value in DTYPES.items()}[export.dtype]
    ids = special_ids(export.vocabulary)
    tree = to_hf_config(export.kind, export.config.model, ids, dtype)
    original = (export.checkpoint.state.get("hf") or {}).get("config", {})
    if export.kind == "chameleon":
        tree |= _chameleon_fields(export, original)
    # Weights that were imported and not trained since keep their folder's own words.
    tree |= {key: value for key, value in original.items() if key != "dtype"}
    write_json(folder / "config.json", tree)
    write_json(
        folder / "generation_config.json", {name: i for name, i in ids.items() if i is not None} | {"do_sample": True}
    )
    if export.vocabulary is None:
        log.warning("the checkpoint knows no vocabulary: %s is left out, tools/generate.py needs it", SIDECAR)
        return
    write_json(folder / SIDECAR, _sidecar(export, export.vocabulary))


def _chameleon_fields(export: Export, original: dict[str, Any]) -> dict[str, Any]:
    if original.get("vq_config") and original.get("vocabulary_map"):
        return {"vq_config": original["vq_config"], "vocabulary_map": original["vocabulary_map"]}
    if export.vocabulary is None:
        raise CheckpointError(
            f"{export.checkpoint.folder} knows no vocabulary; config.json of {export.kind} needs its names and ids"
        )
    return {"vocabulary_map": vocabulary_map(export.vocabulary)}


def _sidecar(export: Export, vocabulary: Vocabulary) -> dict[str, Any]:
    side = round(vocabulary.image_tokens**0.5)
    size, grid = 0, [side, vocabulary.image_tokens // side]
    fingerprints = {}
    for role, path in export.tokenizers.items():
        manifest = read_manifest(path, role)
        fingerprints[role] = manifest.fingerprint
        if role == "image_tokenizer":
            size, grid = manifest.settings["image_size"], list(manifest.settings["grid"])
    stream = export.checkpoint.state.get("stream") or {}
    stores = [source["store"] for source in stream.get("stores", [])]
    return {
        "format": 1,
        "family": vocabulary.family,
        "vocabulary": vocabulary.to_json(),
        "image_size": size,
        "grid": grid,
        "sequence_length": export.config.model.sequence_length,
        "source": {
            "checkpoint": export.checkpoint.manifest.fingerprint,
            "step": export.checkpoint.step,
            "stores": stores,
            **fingerprints,
        },
    }
