"""A Hugging Face folder of safetensors, checked before any tensor is used."""

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch

from megacm3.checkpoint.boxes import Box, whole
from megacm3.checkpoint.tensors import DTYPES, OpenFiles, read_header
from megacm3.convert.carried import tokenizers_in
from megacm3.convert.names import Name
from megacm3.errors import CheckpointError
from megacm3.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors")


class Source(ABC):
    """What is imported: a config and tensors under the names of transformers' classes."""

    folder: Path
    config: dict[str, Any]
    """As in config.json."""
    tensors: dict[str, tuple[str, torch.dtype, tuple[int, ...]]]
    """Name -> (file, dtype, shape)."""
    tokenizers: dict[str, Path]
    """Role -> folder of the tokenizers that come along."""

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor."""

    @abstractmethod
    def read(self, name: str, box: Box, out: torch.Tensor) -> None:
        """Copy a box of a tensor into `out`, cast to its dtype."""

    def check(self, table: list[Name], kept: tuple[str, ...] = ()) -> None:
        """Raise CheckpointError naming tensors that the folder lacks or has in another shape, and tensors that are in
        neither the table nor below one of the prefixes `kept`."""
        self.check_present(table)
        wanted = {name.hf for name in table}
        unknown = [name for name in self.tensors if name not in wanted and not name.startswith(kept or ("\0",))]
        if unknown:
            more = f" and {len(unknown) - 1} more tensors" if len(unknown) > 1 else ""
            raise CheckpointError(f"{self.folder} holds {unknown[0]}{more}, for which this model class has no place")

    def check_present(self, table: list[Name]) -> None:
        """Raise CheckpointError naming tensors of the table that the folder lacks or has in another shape."""
        missing = [name.hf for name in table if name.hf not in self.tensors]
        if missing:
            more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
            raise CheckpointError(f"{self.folder} lacks {missing[0]}{more}, which its config.json asks for")
        for name in table:
            shape = self.tensors[name.hf][2]
            if shape != name.hf_shape:
                raise CheckpointError(
                    f"{self.folder}: {name.hf} has shape {list(shape)}; config.json asks for {list(name.hf_shape)}"
                )


class HfFolder(Source):
    """Config and tensors of a folder.

    Raises CheckpointError for a missing folder or shard, a file name outside the folder, a shard that is cut off or
    whose offsets overlap, a tensor named twice, and tensors that index and shards disagree on; the tensor is named.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{folder} does not exist; expected a Hugging Face folder")
        self.config = self._json("config.json")
        self.tensors = {}
        index = self._weight_map()
        for file in sorted(set(index.values())) if index is not None else [SINGLE]:
            self._add_shard(file, index)
        self.tokenizers = tokenizers_in(self.folder)
        self._files = OpenFiles(self.folder)
        self._repeat = self._shared_norm_rows()

    def _json(self, name: str) -> dict[str, Any]:
        tree = read_json(self.folder / name, error=CheckpointError)
        if not isinstance(tree, dict):
            raise CheckpointError(f"{self.folder / name} holds no JSON object")
        return tree

    def _weight_map(self) -> dict[str, str] | None:
        if not (self.folder / INDEX).is_file():
            if not (self.folder / SINGLE).is_file():
                pickles = sorted(path.name for path in self.folder.glob("*.bin")) + sorted(self.folder.glob("*.pth"))
                other = f"; {pickles[0]} is a pickle" if pickles else ""
                raise CheckpointError(f"{self.folder} has neither {SINGLE} nor {INDEX}{other}")
            return None
        weight_map = self._json(INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{self.folder / INDEX} has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not _SHARD.fullmatch(file):
                raise CheckpointError(
                    f"{self.folder / INDEX}: tensor {name} lies in {file!r}; expected a file of this folder"
                )
        return weight_map

    def _add_shard(self, file: str, index: dict[str, str] | None) -> None:
        path = self.folder / file
        expected = {name for name, where in (index or {}).items() if where == file}
        if index is not None and not path.is_file():
            raise CheckpointError(f"{path} is missing; {INDEX} says that it holds {min(expected)}")
        header = read_header(path)
        if index is not None and (absent := sorted(expected - header.keys())):
            raise CheckpointError(f"{path} does not hold {absent[0]}, which {INDEX} says lies in it")
        for name, entry in header.items():
            if name in self.tensors or (index is not None and name not in expected):
                raise CheckpointError(f"{path} holds {name}, which {INDEX} says lies elsewhere or nowhere")
            self.tensors[name] = (file, DTYPES[entry["dtype"]], tuple(entry["shape"]))

    def _shared_norm_rows(self) -> dict[str, int]:
        """Forks of Chameleon's class (Lumina-mGPT) keep one q/k norm row a shard: how often each stands for a head."""
        repeat = {}
        heads = {"q_norm": "num_attention_heads", "k_norm": "num_key_value_heads"}
        for name, (file, dtype, shape) in self.tensors.items() if self.config.get("model_type") == "chameleon" else ():
            wanted = next((self.config.get(key) for norm, key in heads.items() if f".{norm}." in name), None)
            if wanted and len(shape) == 2 and shape[0] < wanted and wanted % shape[0] == 0:
                repeat[name] = wanted // shape[0]
                self.tensors[name] = (file, dtype, (wanted, shape[1]))
        return repeat

    def read(self, name: str, box: Box, out: torch.Tensor) -> None:
        """As in `Source`."""
        file, _, shape = self.tensors[name]
        if name in self._repeat:
            out.copy_(self.tensor(name)[box.within(whole(shape))])
        else:
            out.copy_(self._files.slice(file, name, box.within(whole(shape))))

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the mapped file."""
        file, _, shape = self.tensors[name]
        rows = shape[0] // self._repeat.get(name, 1) if shape else 0
        held = (rows, *shape[1:]) if shape else ()
        values = self._files.slice(file, name, whole(held).within(whole(held)))
        return values.repeat_interleave(self._repeat[name], 0) if name in self._repeat else values
