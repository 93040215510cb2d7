"""A Hugging Face folder -> a native checkpoint without optimizer state, at any layout, streaming."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from megacm3.checkpoint.boxes import Box, whole
from megacm3.checkpoint.pieces import PARAM
from megacm3.checkpoint.reader import Weights
from megacm3.checkpoint.reshard import config_of, row_chunks, write_checkpoint
from megacm3.checkpoint.tensors import CODES, Entry, in_file_order, write_tensors
from megacm3.config import Config, ModelConfig
from megacm3.convert.carried import keep
from megacm3.convert.configs import SIDECAR, check_image_map, from_hf_config
from megacm3.convert.export_weights import EXTRAS
from megacm3.convert.extend import Extended
from megacm3.convert.folder import HfFolder, Source
from megacm3.convert.meta import MetaFolder, is_meta_folder
from megacm3.convert.names import OPT_OFFSET, Name, head_rows, names
from megacm3.errors import CheckpointError
from megacm3.files import read_json
from megacm3.tokenizers.vocabulary import Vocabulary, image_name

log = logging.getLogger(__name__)
KEPT = ("model.vqmodel.",)
"""Prefixes of tensors that go to `EXTRAS`: the image tokenizer. So do the unused rows of OPT's positions."""


@contextmanager
def opened(
    model: str | Path, output: str | Path, *, trust_pickle: bool = False, extend_vocab: int = 0
) -> Iterator[Source]:
    """The folder to import: of transformers' form or, unpickled beside the output meanwhile, of Meta's.

    extend_vocab: ids to add at the end of the vocabulary.
    """
    folder, output = Path(model), Path(output)
    if extend_vocab:
        with opened(model, output, trust_pickle=trust_pickle) as source:
            yield Extended(source, extend_vocab)
        return
    if not is_meta_folder(folder):
        yield HfFolder(folder)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        yield MetaFolder(folder, Path(scratch), trust_pickle=trust_pickle)


class HfWeights(Weights):
    """The tensors of a folder as logical ones. Raises CheckpointError for what is missing or does not fit."""

    def __init__(self, source: Source) -> None:
        self.source, self.folder = source, source.folder
        self.kind, fields = from_hf_config(source.config, str(source.folder / "config.json"))
        fields |= {"qk_norm_groups": _groups(source, self.kind, ModelConfig(**fields))}
        self.model = ModelConfig(**fields)
        self.table = names(self.kind, self.model)
        source.check(self.table, KEPT if self.kind == "chameleon" else ())
        self.kinds = {PARAM: _one_dtype(source, self.table)}
        self.shapes = {name.logical: name.shape for name in self.table}
        self._by_logical = {name.logical: name for name in self.table}

    @property
    def vocabulary(self) -> dict[str, Any]:
        """{"vocabulary": its table of ids, "answers": whether it was tuned on them}, {} where the folder has none."""
        return _vocabulary(self.source)

    def read(self, kind: str, name: str, box: Box, out: torch.Tensor) -> None:
        """As in `Weights`."""
        _read_logical(self.source, self._by_logical[name], box, out)


def from_hf(
    source: Source,
    output: str | Path,
    tensor: int = 1,
    pipeline: int = 1,
    gate: Callable[[Path], None] = lambda folder: None,
    done: Callable[[int], None] = lambda count: None,
) -> Path:
    """Write the checkpoint; return its folder. Raises CheckpointError for what is missing, damaged or does not fit.

    gate: sees the finished folder under a temporary name, and may refuse it by raising.
    """
    weights = HfWeights(source)
    dtype = weights.kinds[PARAM]
    tree = dataclasses.asdict(Config(model=weights.model)) | {"train": {"steps": 1, "dtype": _train_dtype(dtype)}}
    state = {"step": 0, "hf": {"kind": weights.kind, "config": source.config}} | weights.vocabulary
    return write_checkpoint(
        output,
        kinds=weights.kinds,
        shapes=weights.shapes,
        read=weights.read,
        config=config_of(tree, tensor, pipeline),
        step=0,
        optimizer_step=0,
        state=state,
        inputs={},
        extra=lambda folder: _write_extras(folder, source, weights.table),
        gate=gate,
        done=done,
    )


def _train_dtype(dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else "bf16"


def _one_dtype(source: Source, table: list[Name]) -> torch.dtype:
    by_dtype: dict[torch.dtype, str] = {}
    for name in table:
        by_dtype.setdefault(source.tensors[name.hf][1], name.hf)
    if len(by_dtype) > 1:
        told = ", ".join(f"{name} is {CODES[dtype]}" for dtype, name in by_dtype.items())
        raise CheckpointError(f"{source.folder} mixes dtypes: {told}; expected one for all")
    (dtype,) = by_dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(f"{source.folder}: tensors are {CODES[dtype]}; expected F32, BF16 or F16")
    return dtype


def _vocabulary(source: Source) -> dict[str, Any]:
    """The table of ids: from the folder's megacm3.json, else from a Chameleon config; nothing where neither has it."""
    path, config = source.folder / SIDECAR, source.config
    if path.is_file():
        sidecar = read_json(path, error=CheckpointError)
        tree = sidecar.get("vocabulary")
        # Added ids are reserved: none of them is text, image or special until the table says so.
        table = tree | {"size": max(tree["size"], config["vocab_size"])} if tree else None
        return {"vocabulary": table, "answers": bool(sidecar.get("answers", False))}
    ids = config.get("vocabulary_map") or {}
    if image_name(0) not in ids:
        return {}
    vq = config.get("vq_config") or {}
    side = vq.get("resolution", 512) >> (len(vq.get("channel_multiplier", (1, 1, 2, 2, 4))) - 1)
    codes = sum(name.startswith("IMGIMG") and name.endswith("Z") for name in ids)
    vocabulary = Vocabulary.chameleon(config["vocab_size"], codes, side * side, ids)
    check_image_map(vocabulary, str(source.folder / "config.json"))
    return {"vocabulary": vocabulary.to_json()}


def _groups(source: Source, kind: str, model: ModelConfig) -> int:
    """The fewest rows of q/k norm that hold the per-head rows of the folder exactly: equal rows share one."""
    if kind != "chameleon":
        return 1
    norms = [n for n in names(kind, dataclasses.replace(model, qk_norm_groups=model.heads)) if n.form == "heads"]
    source.check_present(norms)
    for groups in range(1, model.heads + 1):
        if model.heads % groups == 0 and all(_fits(source.tensor(n.hf), min(groups, n.heads)) for n in norms):
            return groups
    raise AssertionError("as many groups as heads always fit")


def _fits(rows: torch.Tensor, groups: int) -> bool:
    heads = rows.shape[0]
    if heads % groups:
        return False
    first = rows[[row * heads // groups for row in range(groups)]]
    return torch.equal(first[head_rows(groups, heads)], rows)


def _read_logical(source: Source, name: Name, box: Box, out: torch.Tensor) -> None:
    if name.form == "positions":
        box = Box((box.offset[0] + OPT_OFFSET, box.offset[1]), box.shape)
    if name.form == "vector":
        source.read(name.hf, Box(box.offset[1:], box.shape[1:]), out[0])
    elif name.form == "heads":
        groups = name.shape[0]
        rows = [row * name.heads // groups for row in range(groups)]
        out.copy_(source.tensor(name.hf)[rows][box.within(whole(name.shape))])
    else:
        source.read(name.hf, box, out)


def _write_extras(folder: Path, source: Source, table: list[Name]) -> dict[str, dict[str, Any]]:
    """The tokenizers, and the tensors that our model does not have, as they are; manifest entries of the latter."""
    keep(source.tokenizers, folder)
    known = {name.hf for name in table}
    boxes = {name: whole(entry[2]) for name, entry in source.tensors.items() if name not in known}
    boxes |= {name.hf: Box((0, 0), (OPT_OFFSET, name.shape[1])) for name in table if name.form == "positions"}
    if not boxes:
        return {}
    entries = in_file_order(Entry(name, source.tensors[name][1], box.shape) for name, box in boxes.items())

    def values(entry: Entry) -> Iterator[torch.Tensor]:
        if not entry.shape:
            yield source.tensor(entry.key)
            return
        for chunk in row_chunks(boxes[entry.key], entry.dtype):
            out = torch.empty(chunk.shape, dtype=entry.dtype)
            source.read(entry.key, chunk, out)
            yield out

    return {EXTRAS: write_tensors(folder / EXTRAS, entries, {"format": "pt"}, values)}
