"""An exported folder, ready to be decoded: the decoder, its vocabulary, and the tokenizers when they are needed."""

from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from megacm3.errors import CheckpointError, DataError
from megacm3.files import read_json
from megacm3.inference.decoder import Decoder
from megacm3.inference.modality import Grammar
from megacm3.tokenizers.image import ImageTokenizer
from megacm3.tokenizers.text import TextTokenizer
from megacm3.tokenizers.vocabulary import Vocabulary

SIDECAR = "megacm3.json"
M = TypeVar("M", bound="ModelFolder")


class ModelFolder:
    """A model and what belongs to it. Make it with `ModelFolder.load`."""

    def __init__(self, folder: Path, decoder: Decoder, sidecar: dict[str, Any], device: str):
        self.folder, self.decoder, self._device = folder, decoder, device
        self.vocabulary = Vocabulary.from_json(sidecar["vocabulary"])
        self.source: dict[str, Any] = sidecar.get("source", {})
        """Fingerprints of what the model was made from, by role."""
        self.answers: bool = sidecar.get("answers", False)
        """Fine-tuned to answer behind `<end-of-turn>` (objective.loss_on = answers)."""
        self._image_size: int = sidecar["image_size"]
        self.grid: tuple[int, int] = (sidecar["grid"][0], sidecar["grid"][1])
        self.context = min(decoder.architecture.positions, sidecar["sequence_length"])
        rows = decoder.architecture.vocab_size
        if rows < self.vocabulary.size or self.grid[0] * self.grid[1] != self.vocabulary.image_tokens:
            raise CheckpointError(
                f"{folder}: the vocabulary has {self.vocabulary.size} ids and {self.vocabulary.image_tokens} codes a "
                f"picture; the model has {rows} rows, the grid is {self.grid[0]} x {self.grid[1]}"
            )
        self.grammar = Grammar(self.vocabulary, rows, decoder.device, turns=self.answers)

    @classmethod
    def load(
        cls: type[M], folder: str | Path, device: str = "cpu", dtype: torch.dtype | None = None, int8: bool = False
    ) -> M:
        """Read an exported folder; `dtype` None means fp32 on CPU, bf16 on CUDA; `int8`: 8-bit matrices (CPU).

        Raises CheckpointError for a folder that is missing or damaged, ConfigError for a device that is not there.
        """
        folder = Path(folder)
        if dtype is None:
            dtype = torch.float32 if device.startswith("cpu") else torch.bfloat16
        decoder = Decoder.load(folder, device, dtype, int8)
        sidecar = read_json(folder / SIDECAR, error=CheckpointError)
        keys = ("vocabulary", "image_size", "grid", "sequence_length")
        missing = [key for key in keys if not isinstance(sidecar, dict) or key not in sidecar]
        if missing:
            raise CheckpointError(f"{folder / SIDECAR} lacks {', '.join(missing)}; use convert_checkpoint.py")
        return cls(folder, decoder, sidecar, device)

    @property
    def image_size(self) -> int:
        """Side of a picture in pixels. Raises DataError when neither the export nor an image tokenizer says it."""
        return self._image_size or self.image_tokenizer.image_size

    @property
    def turns(self) -> bool:
        """Whether its samples have `<end-of-turn>` where prompt and answer meet, as training had it (data/build.py)."""
        return self.answers or self.vocabulary.family == "chameleon"

    @property
    def framing(self) -> str:
        """How training made a prompt's picture square: "crop", or "pad" for chameleon (data/images.py)."""
        return "pad" if self.vocabulary.family == "chameleon" else "crop"

    @cached_property
    def text_tokenizer(self) -> TextTokenizer:
        """Raises DataError when the folder has none, or one of another size."""
        tokenizer = TextTokenizer.load(self._tokenizer_folder("text_tokenizer", "read or write text"))
        if self.vocabulary.family == "cm3leon" and tokenizer.size != self.vocabulary.text_size:
            raise DataError(
                f"{self.folder / 'text_tokenizer'} has {tokenizer.size} ids; the model has {self.vocabulary.text_size}"
            )
        return tokenizer

    @cached_property
    def image_tokenizer(self) -> ImageTokenizer:
        """Raises DataError when the folder has none, or one of another grid or codebook."""
        folder = self._tokenizer_folder("image_tokenizer", "read or make pictures")
        tokenizer = ImageTokenizer.load(folder, self._device)
        found = (tokenizer.image_size, tokenizer.grid, tokenizer.codebook_size)
        # A folder exported without tokenizers says 0 pixels; the grid and the codebook bind what is put there later.
        expected = (self._image_size or tokenizer.image_size, self.grid, self.vocabulary.codebook_size)
        if found != expected:
            raise DataError(f"{folder} has (pixels, grid, codebook) {found}; the model expects {expected}")
        return tokenizer

    def _tokenizer_folder(self, name: str, purpose: str) -> Path:
        if not (self.folder / name).is_dir():
            raise DataError(
                f"{self.folder} has no {name}/, which is needed to {purpose}; "
                "export it from a run that names its tokenizers, or copy the folder there"
            )
        return self.folder / name

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Codes int64 [n, grid] of pictures uint8 [n, s, s, 3]."""
        return self.image_tokenizer.encode(np.array(images)).numpy()

    def pixels_of(self, codes: np.ndarray) -> np.ndarray:
        """Pictures uint8 [n, s, s, 3] of codes int64 [n, grid], in batches of 64."""
        blocks = [self.image_tokenizer.decode(codes[i : i + 64]).numpy() for i in range(0, len(codes), 64)]
        return np.concatenate(blocks)
