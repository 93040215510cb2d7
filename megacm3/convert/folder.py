"""A Hugging Face folder of safetensors, checked before any tensor is used."""

import re
from pathlib import Path
from typing import Any

import torch

from megacm3.checkpoint.boxes import Box, whole
from megacm3.checkpoint.tensors import DTYPES, OpenFiles, read_header
from megacm3.convert.names import Name
from megacm3.errors import CheckpointError
from megacm3.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors")


class HfFolder:
    """Config and tensors of a folder.

    Raises CheckpointError for a missing folder or shard, a file name outside the folder, a shard that is cut off or
    whose offsets overlap, a tensor named twice, and tensors that index and shards disagree on; the tensor is named.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{folder} does not exist; expected a Hugging Face folder")
        self.config: dict[str, Any] = self._json("config.json")
        self.tensors: dict[str, tuple[str, torch.dtype, tuple[int, ...]]] = {}
        """Name -> (file, dtype, shape)."""
        index = self._weight_map()
        for file in sorted(set(index.values())) if index is not None else [SINGLE]:
            self._add_shard(file, index)
        self._files = OpenFiles(self.folder)

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

    def read(self, name: str, box: Box, out: torch.Tensor) -> None:
        """Copy a box of a tensor into `out`, cast to its dtype."""
        file, _, shape = self.tensors[name]
        out.copy_(self._files.slice(file, name, box.within(whole(shape))))

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, as a view of the mapped file."""
        file, _, shape = self.tensors[name]
        return self._files.slice(file, name, whole(shape).within(whole(shape)))

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
