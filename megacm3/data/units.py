"""One unit of pretokenization: one input shard becomes one part of the store, whole or not at all.

The order of work inside a unit: this thread reads the shard, threads decode and prepare pictures some way ahead, one
thread encodes batches, this thread writes. Results are taken in the shard's order and batches are cut by count alone,
so that the bytes written depend on neither the number of workers nor their speed.

With an encoder on a GPU it is the same: each GPU has a worker with its own decoding threads (`threads`), and two
batches lie ready for the encoder, which waits only when those threads together decode less than it takes.
"""

import contextlib
import hashlib
import itertools
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacm3.command import NO_ROOM
from megacm3.data.documents import ANSWER, IMAGE, TEXT
from megacm3.data.images import ImageLimits, Reject, open_image, perceptual_hash, prepare_image
from megacm3.data.parts import PartWriter, read_part
from megacm3.data.sources import ReadOptions, Rejected, Sample, Shard, read_shard
from megacm3.data.store import StoreShape
from megacm3.errors import DataError
from megacm3.files import write_json
from megacm3.sft.read import SftOptions
from megacm3.tokenizers.image import ImageTokenizer
from megacm3.tokenizers.text import TextTokenizer

_BATCHES_AHEAD = 2
"""Batches that wait for the encoder, so that it always has the next one."""
_AT_ONCE = 4
"""Samples that a decoding thread takes at once: handing over each alone costs as much as hashing it."""


@dataclass(frozen=True)
class UnitSettings:
    """What decides the bytes of a part, beside the tokenizers and the shard."""

    mode: str = "crop"
    """Picture preparation: crop or pad; a picture of an answer (fine-tuning) is always cropped."""
    batch: int = 32
    """Pictures encoded at once."""
    max_pixels: int = ImageLimits.max_pixels
    min_side: int = ImageLimits.min_side
    max_aspect: float = ImageLimits.max_aspect
    allow_partial: bool = False
    """Take what is readable of damaged shards."""
    text_filters: tuple[str, ...] = ()
    """datatrove's filters for texts without pictures, by name."""
    max_tokens: int = 0
    """Reject longer documents, with two control tokens a segment; 0 = none is too long."""
    sft: SftOptions | None = None
    """Fine-tuning: the shards hold records of tasks."""

    @staticmethod
    def from_json(raw: dict[str, Any]) -> "UnitSettings":
        """From what `asdict` and JSON made of it."""
        sft = raw.get("sft")
        return UnitSettings(**raw | {"sft": SftOptions(**sft) if sft else None})

    @property
    def limits(self) -> ImageLimits:
        """The limits of a picture's header."""
        return ImageLimits(self.max_pixels, self.min_side, self.max_aspect)


@dataclass
class Prepared:
    """A sample whose pictures are pixels."""

    sample: Sample
    pixels: list[np.ndarray]
    """uint8 [s, s, 3] of each picture."""
    meta: dict[str, Any]
    """Columns of the store's metadata."""


class ShardFault(DataError):
    """The shard as a whole cannot be used; the other shards can."""


def prepare(sample: Sample, size: int, settings: UnitSettings) -> Prepared | Rejected:
    """Decode and resize a sample's pictures and compute its metadata; a Rejected when one of them cannot be used."""
    caption = sample.caption
    meta: dict[str, Any] = {"key": sample.key, "shard": sample.shard, "row": sample.row, "images": sample.images}
    meta |= {"caption": caption, "caption_sha1": hashlib.sha1(caption.encode()).hexdigest() if caption else None}
    meta["task"] = sample.task or None
    pixels = []
    try:
        for i, part in enumerate(sample.parts):
            if isinstance(part, bytes):
                picture = open_image(part, settings.limits)
                answer = bool(sample.answers) and sample.answers[i]
                pixels.append(prepare_image(picture, size, "crop" if answer else settings.mode))
                if len(pixels) == 1:
                    meta |= {"width": picture.width, "height": picture.height, "phash": perceptual_hash(pixels[0])}
                    meta["image_sha256"] = hashlib.sha256(part).hexdigest()
    except Reject as reject:
        return Rejected(sample.key, sample.shard, sample.row, reject.reason, reject.detail)
    return Prepared(sample, pixels, meta)


def shape_of(text: TextTokenizer, image: ImageTokenizer) -> StoreShape:
    """The sizes of a store that these tokenizers make."""
    return StoreShape(text.size, image.codebook_size, image.grid[0] * image.grid[1], image.image_size)


class UnitRunner:
    """Tokenizes shards, one after another, with one pair of tokenizers."""

    def __init__(self, text: TextTokenizer, image: ImageTokenizer, settings: UnitSettings, threads: int = 1) -> None:
        self._text, self._image, self._settings = text, image, settings
        self._threads = threads
        self.shape = shape_of(text, image)
        self.bytes = self.documents = 0
        """Input bytes and documents done so far, for progress."""

    def run(self, shard: Shard, final: Path) -> dict[str, Any]:
        """Write the part of `shard` as the folder `final` (a finished one is left as it is); gives its counts.

        Raises ShardFault when the shard is damaged, DataError when the disk is full.
        """
        done = read_part(final)
        if done is not None:
            return done
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        try:
            counts = self._write(shard, PartWriter(temporary, self.shape))
            _commit(temporary, final)
        except OSError as fault:
            if fault.errno in NO_ROOM:
                raise DataError(f"no room left to write {final.parent}: {fault.strerror}") from fault
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return counts

    def _write(self, shard: Shard, writer: PartWriter) -> dict[str, Any]:
        with ThreadPoolExecutor(self._threads) as pool, ThreadPoolExecutor(1, initializer=_one_thread) as encoder:
            waiting: deque[tuple[list[Prepared | Rejected], Future[np.ndarray]]] = deque()
            for batch in self._batches(self._prepared(shard, pool)):
                waiting.append((batch, encoder.submit(self._encode, batch)))
                if len(waiting) > _BATCHES_AHEAD:
                    self._store(writer, *waiting.popleft())
            while waiting:
                self._store(writer, *waiting.popleft())
        return writer.finish()

    def _prepared(self, shard: Shard, pool: ThreadPoolExecutor) -> Iterator[Prepared | Rejected]:
        waiting: deque[Future[list[Prepared | Rejected]]] = deque()
        settings, size = self._settings, self._image.image_size
        options = ReadOptions(settings.allow_partial, text_filters=tuple(settings.text_filters), sft=settings.sft)
        # Enough ahead for every thread, and for two batches of the encoder.
        most = max(2 * settings.batch // _AT_ONCE, 2 * self._threads)
        for items in _grouped(_guarded(shard, options), _AT_ONCE):
            self.bytes += sum(len(part) for item in items if isinstance(item, Sample) for part in item.parts)
            waiting.append(pool.submit(_prepare_all, items, size, settings))
            if len(waiting) > most:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()

    def _batches(self, items: Iterator[Prepared | Rejected]) -> Iterator[list[Prepared | Rejected]]:
        batch: list[Prepared | Rejected] = []
        pictures = 0
        for item in items:
            batch.append(item)
            pictures += len(item.pixels) if isinstance(item, Prepared) else 0
            # Texts alone count too, so that a text-only shard is written as it is read.
            if pictures >= self._settings.batch or len(batch) >= 8 * self._settings.batch:
                yield batch
                batch, pictures = [], 0
        if batch:
            yield batch

    def _encode(self, batch: list[Prepared | Rejected]) -> np.ndarray:
        # int64 [pictures of the batch, codes]; never more than `batch` pictures at once, whatever a document holds.
        # Equal pictures are encoded once: fine-tuning sets ask several questions about each.
        every = [picture for item in batch if isinstance(item, Prepared) for picture in item.pixels]
        places: dict[bytes, int] = {}
        order = [places.setdefault(hashlib.sha1(picture.data).digest(), len(places)) for picture in every]
        pixels = [every[order.index(place)] for place in range(len(places))]
        size = self._settings.batch
        blocks = [self._image.encode(np.stack(pixels[i : i + size])).numpy() for i in range(0, len(pixels), size)]
        return np.concatenate(blocks)[order] if blocks else np.zeros((0, self.shape.image_tokens), np.int64)

    def _store(self, writer: PartWriter, batch: list[Prepared | Rejected], codes: "Future[np.ndarray]") -> None:
        pictures = iter(codes.result())
        texts = [
            part for item in batch if isinstance(item, Prepared) for part in item.sample.parts if isinstance(part, str)
        ]
        ids = iter(self._text.encode_batch(texts))
        for item in batch:
            if isinstance(item, Rejected):
                writer.reject(item)
                continue
            segments = [
                (TEXT, np.asarray(next(ids), np.int64)) if isinstance(part, str) else (IMAGE, next(pictures))
                for part in item.sample.parts
            ]
            tokens = sum(len(values) + 2 for _, values in segments)
            if self._settings.max_tokens and tokens > self._settings.max_tokens:
                sample, detail = item.sample, f"{tokens} tokens, more than {self._settings.max_tokens}"
                writer.reject(Rejected(sample.key, sample.shard, sample.row, "too_long", detail))
                continue
            flags = item.sample.answers or (False,) * len(segments)
            marked = [(mode | ANSWER * flag, values) for (mode, values), flag in zip(segments, flags, strict=True)]
            writer.add(marked, item.meta)
            self.documents += 1


def _guarded(shard: Shard, options: ReadOptions) -> Iterator[Sample | Rejected]:
    try:
        yield from read_shard(shard, options)
    except DataError as fault:
        raise ShardFault(str(fault)) from fault


def _grouped(items: Iterator[Sample | Rejected], size: int) -> Iterator[list[Sample | Rejected]]:
    while group := list(itertools.islice(items, size)):
        yield group


def _prepare_all(items: list[Sample | Rejected], size: int, settings: UnitSettings) -> list[Prepared | Rejected]:
    return [prepare(item, size, settings) if isinstance(item, Sample) else item for item in items]


def _one_thread() -> None:
    # One thread an encoder on the CPU: sums come out the same for any number of workers, which share the cores anyway.
    import torch

    torch.set_num_threads(1)


def _commit(temporary: Path, final: Path) -> None:
    from megacm3.files import fsync_tree

    fsync_tree(temporary)
    if final.exists() and read_part(final) is None:
        shutil.rmtree(final)
    with contextlib.suppress(OSError):
        # Another worker may have finished the same unit in the meantime: its part is the same.
        os.rename(temporary, final)
    if read_part(final) is None:
        raise DataError(f"{final} could not be put in place")


def write_fault(path: Path, shard: Shard, fault: ShardFault) -> None:
    """Note that a shard could not be used."""
    write_json(path, {"shard": shard.name, "reason": str(fault)})
