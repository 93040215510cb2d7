"""Text and picture to unit vectors: a CLIP of `transformers` or of `open_clip` from a local folder.

The folder is what `CLIPModel.save_pretrained` and `CLIPProcessor.save_pretrained` leave: config.json, weights,
preprocessor_config.json, tokenizer files. CM3Leon's retriever is such a ViT-B/32; `train_encoder` makes small ones.
A folder with open_clip_config.json is one of open_clip's (open_clip_encoder.py).
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from PIL import Image

from megacm3.errors import DataError
from megacm3.files import MANIFEST, read_json, read_manifest, sha256_file, sha256_json
from megacm3.tokenizers.image import torch_device

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

KIND = "encoder"
OPEN_CLIP = "open_clip_config.json"
"""The file that makes a folder one of open_clip's."""
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
REQUIRED = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
"""Files without which a folder is no CLIP; the weights may be one file or several."""
_READ: tuple[str, ...] = ("config.json", "*.safetensors", "*.safetensors.index.json", "preprocessor_config.json")
_READ += (OPEN_CLIP, "tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")

Pictures: TypeAlias = Sequence[Image.Image] | np.ndarray
"""PIL pictures of any size and mode, or uint8 [n, s, s, 3]."""


def normalise(vectors: np.ndarray) -> np.ndarray:
    """float32 [n, d] with rows of length 1. Raises DataError when a row is not finite or has length 0."""
    vectors = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    bad = ~(np.isfinite(lengths[..., 0]) & (lengths[..., 0] > 0))
    if bad.any():
        first = int(bad.argmax())
        raise DataError(f"{int(bad.sum())} of {len(vectors)} vectors are zero or not finite (first: row {first})")
    return vectors / lengths


def document_vectors(image_vectors: np.ndarray, text_vectors: np.ndarray) -> np.ndarray:
    """float32 [n, d]: mean of the unit image and text vectors, normalised (CM3Leon 2.1, RA-CM3)."""
    return normalise(normalise(image_vectors) + normalise(text_vectors))


def encoder_fingerprint(folder: str | Path) -> str:
    """What identifies an encoder: its manifest's fingerprint, or a hash of all its files where it has no manifest."""
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return read_manifest(folder, KIND).fingerprint
    _check_folder(folder)
    return sha256_json({path.name: sha256_file(path) for path in encoder_files(folder)})


def encoder_files(folder: Path) -> list[Path]:
    """The files that make an encoder: those of its manifest, or of a download what is read (not other formats)."""
    if (folder / MANIFEST).is_file():
        return [folder / MANIFEST, *(folder / name for name in read_manifest(folder, KIND).files)]
    return sorted({path for pattern in _READ for path in folder.glob(pattern)})


def encoder_width(folder: str | Path) -> int:
    """Width of the vectors that a CLIP folder makes, without loading it."""
    _check_folder(Path(folder))
    if (Path(folder) / OPEN_CLIP).is_file():
        return int(read_json(Path(folder) / OPEN_CLIP)["model_cfg"]["embed_dim"])
    width = read_json(Path(folder) / "config.json").get("projection_dim", 512)
    if not isinstance(width, int):
        raise DataError(f"{folder}/config.json has projection_dim {width!r}; expected a number")
    return width


class Encoder:
    """A frozen CLIP in fp32. Make it with `Encoder.load`."""

    def __init__(self, model: Any, tokenizer: Any, processor: Any, fingerprint: str) -> None:
        """model: CLIPModel; tokenizer: CLIPTokenizer; processor: CLIPImageProcessorPil."""
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.fingerprint = fingerprint
        """Of the folder it came from; empty while it is being trained."""
        self.dim: int = model.config.projection_dim
        self.max_tokens: int = model.config.text_config.max_position_embeddings - 2
        """Tokens of a text that are read, begin and end marks not counted."""

    @staticmethod
    def load(folder: str | Path, device: str = "cpu") -> "Encoder":
        """Open a CLIP folder; nothing is fetched from anywhere.

        Raises DataError when the folder is missing, incomplete, damaged (a manifest's hashes are checked) or no CLIP,
        ConfigError for a device that is not there, or an open_clip that is not installed.
        """
        folder = Path(folder)
        _check_folder(folder)
        import torch

        torch_device(device)
        if (folder / MANIFEST).is_file():
            read_manifest(folder, KIND, verify="sha256")
        if (folder / OPEN_CLIP).is_file():
            from megacm3.retrieval.open_clip_encoder import load_open_clip

            return load_open_clip(folder, device, encoder_fingerprint(folder))
        from transformers import CLIPModel, CLIPTokenizer
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        model: Any
        try:
            with _no_progress_bars():
                model, info = cast(Any, CLIPModel).from_pretrained(
                    folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
                )
            # A caption that holds the text of a special token must not become that token.
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, split_special_tokens=True)
            processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except Exception as fault:
            # From KeyError to SafetensorError and, from tokenizers, plain Exception.
            raise DataError(f"{folder} is not a readable CLIP folder: {type(fault).__name__}: {fault}") from fault
        lacking = sorted(info["missing_keys"])
        if lacking or info["mismatched_keys"]:
            raise DataError(f"{folder}: the weights lack {len(lacking)} tensors of its config (first: {lacking[:1]})")
        return Encoder(model.to(device).eval(), tokenizer, processor, encoder_fingerprint(folder))

    @property
    def image_size(self) -> int:
        """Side in pixels of the pictures that the model sees."""
        return int(self.model.config.vision_config.image_size)

    def encode_images(self, images: Pictures, batch: int = 64) -> np.ndarray:
        """float32 [n, d], unit length."""
        starts = range(0, len(images), batch)
        blocks = [self.encode_pixels(self.pixels(images[start : start + batch])) for start in starts]
        return np.concatenate(blocks) if blocks else np.zeros((0, self.dim), np.float32)

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [n, d], unit length, of pixels as the model wants them (float32 [n, 3, s, s]), in one batch."""
        import torch

        with torch.inference_mode():
            given = torch.from_numpy(np.ascontiguousarray(pixels, np.float32)).to(self.device)
            return self._collect([self._image_features(given)])

    def encode_texts(self, texts: Sequence[str], batch: int = 64) -> np.ndarray:
        """float32 [n, d], unit length."""
        return self.encode_tokens(self.tokenize(texts), batch)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text without begin and end marks, cut to what the model can read."""
        if not texts:
            return []
        rows = self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        return [row[: self.max_tokens] for row in rows]

    def encode_tokens(self, rows: Sequence[Sequence[int]], batch: int = 64) -> np.ndarray:
        """float32 [n, d], unit length, of ids as `tokenize` gives them (queries with dropped tokens)."""
        import torch

        blocks = []
        for start in range(0, len(rows), batch):
            ids, mask = (tensor.to(self.device) for tensor in self.batch_tokens(rows[start : start + batch]))
            with torch.inference_mode():
                blocks.append(self._text_features(ids, mask))
        return self._collect(blocks)

    def pixels(self, images: Pictures) -> np.ndarray:
        """float32 [n, 3, s, s] as the model wants them: resized, cropped and normalised as the folder says."""
        flat = [np.asarray(image if isinstance(image, np.ndarray) else flatten(image)) for image in images]
        result = self.processor(images=flat, return_tensors="np", input_data_format="channels_last")
        return np.ascontiguousarray(result.pixel_values, np.float32)

    def batch_tokens(self, rows: Sequence[Sequence[int]]) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Ids with begin and end marks and their attention mask, int64 [n, longest], padded on the right."""
        import torch

        begin, end, pad = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        marked = [[begin, *row, end] for row in rows]
        longest = max(map(len, marked))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in marked])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in marked])
        return ids, mask

    @property
    def device(self) -> "torch.device":
        """Where the model is."""
        return next(self.model.parameters()).device

    def _image_features(self, pixels: "torch.Tensor") -> "torch.Tensor":
        # transformers 5 gives an output object; the projected, not normalised vector is its pooler_output.
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def _text_features(self, ids: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
        return self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output

    def _collect(self, blocks: list["torch.Tensor"]) -> np.ndarray:
        if not blocks:
            return np.zeros((0, self.dim), np.float32)
        vectors = np.concatenate([block.float().cpu().numpy() for block in blocks])
        assert vectors.shape[1] == self.dim, vectors.shape
        return normalise(vectors)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def flatten(image: Image.Image) -> Image.Image:
    # Transparency on white, as everywhere else in the project; PIL's convert("RGB") shows what lies below it.
    if image.mode == "RGB":
        return image
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist (expected a CLIP folder of transformers or open_clip: --encoder DIR)")
    if (folder / OPEN_CLIP).is_file():
        if not (folder / OPEN_CLIP_WEIGHTS).is_file():
            raise DataError(f"{folder} lacks {OPEN_CLIP_WEIGHTS}; expected open_clip's weights as safetensors")
        return
    lacking = [name for name in REQUIRED if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in _WEIGHTS):
        lacking.append(_WEIGHTS[0])
    if lacking:
        raise DataError(f"{folder} lacks {', '.join(lacking)}; expected a complete CLIP folder of transformers")
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "clip":
        raise DataError(f"{folder}/config.json is of model type '{kind}'; expected 'clip'")
