"""An encoder from a folder of open_clip: open_clip_config.json and open_clip_model.safetensors.

That is how open_clip's models are published. Towers whose tokenizer comes from elsewhere (`hf_tokenizer_name`) are
refused: nothing is fetched here. Pictures are prepared by open_clip's own transform, in fp32.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megacm3.errors import ConfigError, DataError
from megacm3.files import read_json
from megacm3.retrieval.encoder import OPEN_CLIP, Encoder, Pictures, flatten

if TYPE_CHECKING:
    import torch


def load_open_clip(folder: Path, device: str, fingerprint: str) -> Encoder:
    """Open a folder of open_clip.

    Raises ConfigError when open_clip is not installed, DataError for a folder that it cannot read.
    """
    try:
        import open_clip
    except (ImportError, RuntimeError) as fault:
        # RuntimeError: a torchvision that was built for another torch (the package index has that for CUDA).
        raise ConfigError(
            f"{folder} is a model of open_clip, which cannot be imported ({fault}); in the checkout: "
            "pip install -e '.[open_clip]', with the torchvision that belongs to this torch"
        ) from fault
    text = read_json(folder / OPEN_CLIP).get("model_cfg", {}).get("text_cfg", {})
    if "hf_tokenizer_name" in text or "hf_model_name" in text:
        raise DataError(f"{folder} has a text tower from elsewhere; expected one with open_clip's own tokenizer")
    try:
        model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder.resolve()}", precision="fp32")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder.resolve()}")
    except Exception as fault:
        # Of many kinds: KeyError, RuntimeError, SafetensorError ...
        lines = str(fault).splitlines() or [""]
        raise DataError(f"{folder} is not a readable open_clip folder: {type(fault).__name__}: {lines[0]}") from fault
    width = int(read_json(folder / OPEN_CLIP)["model_cfg"]["embed_dim"])
    return OpenClipEncoder(model.to(device).eval(), tokenizer, transform, fingerprint, width)


class OpenClipEncoder(Encoder):
    """A frozen CLIP of open_clip in fp32."""

    def __init__(self, model: Any, tokenizer: Any, transform: Any, fingerprint: str, dim: int) -> None:
        """model: open_clip's CLIP; tokenizer: its SimpleTokenizer; transform: PIL picture to float32 [3, s, s]."""
        self.model, self.tokenizer, self.processor = model, tokenizer, transform
        self.fingerprint, self.dim = fingerprint, dim
        self.max_tokens = int(tokenizer.context_length) - 2

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures that the model sees."""
        size = self.model.visual.image_size
        return int(size[0] if isinstance(size, (tuple, list)) else size)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text without begin and end marks, cut to what the model can read."""
        marks = {self.tokenizer.sot_token_id, self.tokenizer.eot_token_id}
        # A caption that holds the text of a mark must not become that mark.
        rows = ([token for token in self.tokenizer.encode(text) if token not in marks] for text in texts)
        return [row[: self.max_tokens] for row in rows]

    def pixels(self, images: Pictures) -> np.ndarray:
        """float32 [n, 3, s, s] by open_clip's transform."""
        from PIL import Image

        pictures = (Image.fromarray(image) if isinstance(image, np.ndarray) else flatten(image) for image in images)
        return np.stack([self.processor(picture).numpy() for picture in pictures]).astype(np.float32)

    def batch_tokens(self, rows: Sequence[Sequence[int]]) -> "tuple[torch.Tensor, torch.Tensor]":
        """Ids with begin and end marks, padded with 0 to the length that the model wants, and their mask."""
        import torch

        ids = torch.zeros(len(rows), self.max_tokens + 2, dtype=torch.int64)
        for n, row in enumerate(rows):
            marked = [self.tokenizer.sot_token_id, *row, self.tokenizer.eot_token_id]
            ids[n, : len(marked)] = torch.tensor(marked)
        return ids, (ids != 0).long()

    def _image_features(self, pixels: "torch.Tensor") -> "torch.Tensor":
        return self.model.encode_image(pixels)

    def _text_features(self, ids: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
        return self.model.encode_text(ids)
