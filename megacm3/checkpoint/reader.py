"""A committed checkpoint step, read box by box."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megacm3.checkpoint.boxes import Box
from megacm3.checkpoint.pieces import MASTER, PARAM, trained_numel
from megacm3.checkpoint.tensors import DTYPES, OpenFiles
from megacm3.errors import CheckpointError
from megacm3.files import Manifest, read_manifest

KIND = "checkpoint"


def key_of(kind: str, name: str, box: Box) -> str:
    """Key of a piece in its file: `exp_avg/layers.0.attn.q.weight[0:32,0:64]`."""
    return f"{kind}/{name}[{box}]"


class Weights(ABC):
    """Logical tensors that can be read box by box: a checkpoint's, or those of a folder in another form."""

    folder: Path
    kinds: dict[str, torch.dtype]
    shapes: dict[str, tuple[int, ...]]
    optimizer_step: int = 0

    @abstractmethod
    def read(self, kind: str, name: str, box: Box, out: torch.Tensor) -> None:
        """Copy a box into `out` (of the box's shape, any device; cast to its dtype). Raises CheckpointError."""

    def check_tensors(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError naming tensors that are missing, extra or of another shape."""
        missing, extra = sorted(wanted.keys() - self.shapes.keys()), sorted(self.shapes.keys() - wanted.keys())
        if missing or extra:
            told = [f"lacks {', '.join(missing[:4])}"] if missing else []
            told += [f"has besides {', '.join(extra[:4])}"] if extra else []
            raise CheckpointError(f"{self.folder} does not fit the model of this config: it {' and '.join(told)}")
        for name, shape in wanted.items():
            if self.shapes[name] != shape:
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {self.shapes[name]}; the config expects {shape}"
                )


class Checkpoint(Weights):
    """What a step's folder holds. Raises CheckpointError when it is not whole.

    verify: "size" or "sha256", as in `files.read_manifest`.
    """

    def __init__(self, folder: str | Path, *, verify: str = "size") -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder, KIND, verify=verify, error=CheckpointError)
        settings = self.manifest.settings
        try:
            self.step: int = settings["step"]
            self.optimizer_step: int = settings["optimizer_step"]
            self.state: dict[str, Any] = settings["state"]
            self.config: dict[str, Any] = settings["config"]
            self.layout: dict[str, Any] = settings["layout"]
            self.kinds = {kind: DTYPES[code] for kind, code in settings["kinds"].items()}
            self.shapes = {name: tuple(shape) for name, shape in settings["tensors"].items()}
            self.trained: dict[str, list[str]] | None = settings.get("trained")
            self._places = self._index(settings["boxes"])
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            raise CheckpointError(f"{self.folder}: its manifest lacks or garbles a field ({fault!r})") from fault
        self._files = OpenFiles(self.folder)

    def _index(self, files: dict[str, Any]) -> dict[tuple[str, str], list[tuple[Box, str]]]:
        places: dict[tuple[str, str], list[tuple[Box, str]]] = {}
        for file, kinds in files.items():
            if file not in self.manifest.files:
                raise ValueError(f"{file} is not among the files")
            for kind, tensors in kinds.items():
                for name, boxes in tensors.items():
                    if name not in self.shapes or kind not in self.kinds:
                        raise ValueError(f"{kind}/{name} is in no table")
                    places.setdefault((kind, name), []).extend((Box.parse(text), file) for text in boxes)
        return places

    @contextmanager
    def hashed_meanwhile(self) -> Iterator[Callable[[], object]]:
        """Hash every file while the body runs. Gives what waits for the verdict: CheckpointError for a damaged file."""
        with ThreadPoolExecutor(1) as beside:
            yield beside.submit(read_manifest, self.folder, KIND, verify="sha256", error=CheckpointError).result

    def boxes(self, kind: str, name: str) -> list[tuple[Box, str]]:
        """The boxes of a tensor and the file of each."""
        return self._places.get((kind, name), [])

    def check_tensors(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """As in `Weights`, and for tensors that are not wholly covered."""
        super().check_tensors(wanted)
        self.check_coverage()

    def check_coverage(self) -> None:
        """Raise CheckpointError when the boxes of a tensor do not add up to it, for any kind."""
        for kind in self.kinds:
            for name, shape in self.shapes.items():
                found = sum(box.numel for box, _ in self.boxes(kind, name))
                expected = trained_numel(None if kind == PARAM else self.trained, name, shape)
                if found != expected:
                    raise CheckpointError(
                        f"{self.folder}: {kind} of {name} has {found} elements in its boxes; expected {expected}"
                    )

    def read(self, kind: str, name: str, box: Box, out: torch.Tensor) -> None:
        """Copy a box into `out` (of the box's shape, any device; cast to its dtype).

        Masters exist of what trained: the rest of a box is its parameters. Raises CheckpointError naming the tensor
        when the checkpoint does not cover the box or a file is damaged.
        """
        partial = kind == MASTER and self.trained is not None
        copied = self._copy(PARAM if partial else kind, name, box, out)
        if partial:
            self._copy(MASTER, name, box, out)
        if copied != box.numel:
            raise CheckpointError(
                f"{self.folder}: {kind} of {name} lacks part of [{box}]: {copied} of {box.numel} elements"
            )

    def _copy(self, kind: str, name: str, box: Box, out: torch.Tensor) -> int:
        copied = 0
        for held, file in self.boxes(kind, name):
            shared = box.intersection(held)
            if shared is None:
                continue
            values = self._files.slice(file, key_of(kind, name, held), shared.within(held))
            out[shared.within(box)].copy_(values)
            copied += shared.numel
        return copied
