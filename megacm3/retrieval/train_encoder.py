"""The job that makes an encoder folder: a small CLIP of one's own, or further training of an existing one.

Everything is in memory and in one process: this is for sets of up to some 100,000 pairs.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megacm3.errors import ConfigError, DataError
from megacm3.files import new_folder, read_json, write_json, write_manifest
from megacm3.retrieval.contrastive import fit
from megacm3.retrieval.encoder import KIND, Encoder, document_vectors, encoder_files, encoder_fingerprint
from megacm3.retrieval.jobs import Job
from megacm3.retrieval.new_encoder import EncoderTraining, new_encoder
from megacm3.tokenizers.image import torch_device

if TYPE_CHECKING:
    from megacm3.data.sources import Sample

logger = logging.getLogger(__name__)

FIGURES = "training.json"
"""Recall and losses, beside the weights."""


@dataclass(frozen=True)
class Pairs:
    """Training pairs in memory."""

    images: np.ndarray
    """uint8 [n, s, s, 3]."""
    captions: list[str]

    @property
    def fingerprint(self) -> str:
        """Of pictures and captions."""
        digest = hashlib.sha256(json.dumps(self.captions).encode())
        digest.update(np.ascontiguousarray(self.images).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class EncoderOptions:
    """An encoder to be made."""

    inputs: tuple[str, ...]
    """Paths and globs of captioned pictures."""
    output: str
    training: EncoderTraining = field(default_factory=EncoderTraining)
    base: str = ""
    """A CLIP folder to train further; its sizes then count, not those of `training`."""
    limit: int = 200_000
    """Pairs read at most; a picture of 224 pixels takes 150 kB of memory."""
    device: str = "cpu"
    overwrite: bool = False


@dataclass(frozen=True)
class EncoderReport:
    """What was made."""

    pairs: int
    dim: int
    figures: dict[str, float]
    """recall_image, recall_text (see `recall`), loss_first, loss_last (mean of ten steps)."""
    seconds: float
    """0 when the encoder was there already."""


def make_encoder(options: EncoderOptions) -> EncoderReport:
    """Read the pairs, train, write the folder; nothing of that when it is there already.

    Raises ConfigError for impossible settings, DataError for bad input, a base that is no CLIP, an output that exists.
    """
    started = time.monotonic()
    options.training.check()
    torch_device(options.device)
    if options.limit < 2:
        raise ConfigError(f"--limit {options.limit}; expected at least 2 pairs")
    base = Encoder.load(options.base, options.device) if options.base else None
    pairs = read_pairs(options.inputs, base.image_size if base else options.training.image_size, options.limit)
    inputs = {"pairs": pairs.fingerprint} | ({"base": encoder_fingerprint(options.base)} if options.base else {})
    job = Job(Path(options.output), KIND, asdict(options.training), inputs)
    finished = job.finished(options.overwrite)
    if finished:
        logger.info("%s is finished already: same pairs and settings", options.output)
        figures = read_json(Path(options.output) / FIGURES)
        return EncoderReport(len(pairs.captions), finished.settings["dim"], figures, 0.0)
    encoder, figures = train_encoder(pairs, options.training, base, options.device)
    with new_folder(options.output, replace=options.overwrite) as folder:
        save(encoder, folder)
        write_json(folder / FIGURES, figures)
        sizes = {"dim": encoder.dim, "image_size": encoder.image_size}
        write_manifest(folder, KIND, sizes | {"job": job.settings}, inputs)
    return EncoderReport(len(pairs.captions), encoder.dim, figures, time.monotonic() - started)


def train_encoder(
    pairs: Pairs, training: EncoderTraining, base: Encoder | None = None, device: str = "cpu"
) -> tuple[Encoder, dict[str, float]]:
    """A new encoder, or `base` itself, trained on `pairs`; and its figures."""
    encoder = base or new_encoder(training, pairs.captions)
    encoder.model.to(device)
    losses = fit(encoder, pairs.images, pairs.captions, training)
    ends = {"loss_first": losses[0], "loss_last": float(np.mean(losses[-10:]))}
    return encoder, recall(encoder, pairs) | ends


def read_pairs(inputs: Iterable[str], image_size: int, limit: int = 200_000) -> Pairs:
    """The first `limit` captioned pictures of the given paths and globs, prepared at `image_size` pixels.

    Rows that cannot be used are left out and counted in the log. Raises DataError when fewer than two are left.
    """
    inputs = list(inputs)
    found = list(islice(_captioned(inputs, image_size), limit))
    if len(found) < 2:
        raise DataError(f"--input {' '.join(inputs)} holds {len(found)} captioned pictures; at least 2 are needed")
    return Pairs(np.stack([image for image, _ in found]), [caption for _, caption in found])


def _captioned(inputs: list[str], image_size: int) -> Iterator[tuple[np.ndarray, str]]:
    from megacm3.data.images import ImageLimits, Reject, open_image, prepare_image
    from megacm3.data.sources import Sample, find_shards, read_shard

    limits = ImageLimits(min_side=1)
    left_out = 0
    for shard in find_shards(inputs):
        for item in read_shard(shard):
            picture = _first_picture(item) if isinstance(item, Sample) else None
            if picture is None or not isinstance(item, Sample):
                left_out += 1
                continue
            try:
                yield prepare_image(open_image(picture, limits), image_size), item.caption
            except Reject:
                left_out += 1
    if left_out:
        logger.info("%d rows without a usable picture and caption are left out", left_out)


def _first_picture(sample: "Sample") -> bytes | None:
    pictures = [part for part in sample.parts if isinstance(part, bytes)]
    return pictures[0] if pictures and sample.caption else None


def save(encoder: Encoder, folder: Path) -> None:
    """Write a complete CLIP folder of transformers: config, weights, preprocessor, tokenizer."""
    from safetensors.torch import save_file

    # Not model.save_pretrained: it imports DeepSpeed where that is installed, which takes seconds.
    encoder.model.config.architectures = ["CLIPModel"]
    encoder.model.config.save_pretrained(folder)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    encoder.tokenizer.save_pretrained(folder)
    encoder.processor.save_pretrained(folder)


def copy_encoder(source: str | Path, target: str | Path) -> None:
    """Copy what makes an encoder into a new folder; the copy has the same fingerprint."""
    with new_folder(target) as folder:
        for path in encoder_files(Path(source)):
            place = folder / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def recall(encoder: Encoder, pairs: Pairs) -> dict[str, float]:
    """Share of pictures, and of captions, whose best document among all pairs is their own (or has its caption)."""
    image, text = encoder.encode_images(pairs.images), encoder.encode_texts(pairs.captions)
    documents = document_vectors(image, text)
    captions = np.array([caption.casefold() for caption in pairs.captions])
    found = {}
    for name, queries in (("image", image), ("text", text)):
        best = np.concatenate([(queries[i : i + 1024] @ documents.T).argmax(1) for i in range(0, len(queries), 1024)])
        found[f"recall_{name}"] = float((captions[best] == captions).mean())
    return found
