"""Pictures prepared once and read many times: what image tokenizer training runs over.

A sample's `regions` (faces, objects), where its metadata has them, are boxes [left, top, right, bottom, weight] in
pixels of the upright picture; the weight is 1 when it is left out.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacm3.command import progress
from megacm3.data.images import DEFAULT_LIMITS, ImageLimits, Reject, open_image, prepare_image
from megacm3.data.sources import Rejected, Shard, read_shard
from megacm3.errors import DataError
from megacm3.files import new_file, read_json, write_json

logger = logging.getLogger(__name__)

REGIONS = 8
"""Regions kept of a picture: the first ones."""
_FACTS, _PIXELS, _REGIONS = "pictures.json", "pictures.u8", "regions.f4"


@dataclass(frozen=True)
class Pictures:
    """Prepared pictures, mapped from files."""

    pixels: np.ndarray
    """uint8 [n, size, size, 3]"""
    regions: np.ndarray
    """float32 [n, 8, 5]: left, top, right, bottom in pixels of the prepared picture, and weight; zeros where none."""

    def __len__(self) -> int:
        return len(self.pixels)


def open_pictures(folder: Path, *, job: str, size: int, most: int = 0) -> Pictures | None:
    """What `prepare_pictures` made of these inputs, or None."""
    if not (folder / _FACTS).is_file():
        return None
    facts = read_json(folder / _FACTS)
    if (facts["job"], facts["size"], facts["most"]) != (job, size, most):
        return None
    count = facts["count"]
    pixels = np.memmap(folder / _PIXELS, np.uint8, "r", shape=(count, size, size, 3))
    return Pictures(pixels, np.memmap(folder / _REGIONS, np.float32, "r", shape=(count, REGIONS, 5)))


def prepare_pictures(
    shards: list[Shard],
    size: int,
    folder: Path,
    *,
    job: str,
    limits: ImageLimits = DEFAULT_LIMITS,
    most: int = 0,
    threads: int = 4,
    max_reject_rate: float = 0.05,
) -> Pictures:
    """All pictures of the shards, cropped to `size`, in files in `folder`, which are made if they are not there yet.

    `job` names the inputs: pictures of another job are made anew. At most `most` are taken (0: all). Raises DataError
    when there is no picture, or when more than `max_reject_rate` of the rows are rejected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = open_pictures(folder, job=job, size=size, most=most)
    if found is not None:
        return found
    (folder / _FACTS).unlink(missing_ok=True)
    rejects: Counter[str] = Counter()
    items = _prepared(shards, size, limits, threads, rejects)
    count = 0
    with new_file(folder / _PIXELS) as pixels_path, new_file(folder / _REGIONS) as regions_path:
        with open(pixels_path, "wb") as pixels_file, open(regions_path, "wb") as regions_file:
            for pixels, regions in progress(items, unit=" pictures", description="prepare"):
                pixels_file.write(pixels.tobytes())
                regions_file.write(regions.tobytes())
                count += 1
                if count == most:
                    break
    _check_counts(count, rejects, max_reject_rate)
    write_json(folder / _FACTS, {"job": job, "size": size, "most": most, "count": count})
    made = open_pictures(folder, job=job, size=size, most=most)
    assert made is not None
    return made


def _check_counts(count: int, rejects: Counter[str], max_reject_rate: float) -> None:
    refused = sum(rejects.values())
    reasons = ", ".join(f"{n} {reason}" for reason, n in rejects.most_common())
    if refused:
        logger.info("%d rows rejected: %s", refused, reasons)
    if refused > max_reject_rate * (count + refused):
        raise DataError(f"{refused} of {count + refused} rows rejected ({reasons}), above --max-reject-rate")
    if count == 0:
        raise DataError("the inputs hold no picture; check --input")


def _prepared(
    shards: list[Shard], size: int, limits: ImageLimits, threads: int, rejects: Counter[str]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    waiting: deque[Future[tuple[np.ndarray, np.ndarray] | Reject]] = deque()

    def ready(leave: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while len(waiting) > leave:
            result = waiting.popleft().result()
            if isinstance(result, Reject):
                rejects[result.reason] += 1
            else:
                yield result

    with ThreadPoolExecutor(threads) as pool:
        for item in (item for shard in shards for item in read_shard(shard)):
            if isinstance(item, Rejected):
                rejects[item.reason] += 1
                continue
            pictures = [part for part in item.parts if isinstance(part, bytes)]
            # Boxes of a document with several pictures would not say which one they are in.
            boxes = item.meta.get("regions") if len(pictures) == 1 else None
            waiting.extend(pool.submit(_prepare, data, boxes, size, limits) for data in pictures)
            yield from ready(4 * threads)
        yield from ready(0)


def _prepare(data: bytes, boxes: Any, size: int, limits: ImageLimits) -> tuple[np.ndarray, np.ndarray] | Reject:
    try:
        picture = open_image(data, limits)
        return prepare_image(picture, size), crop_regions(boxes, picture.size, size)
    except Reject as reject:
        return reject


def crop_regions(boxes: Any, picture: tuple[int, int], size: int) -> np.ndarray:
    """float32 [8, 5] of boxes in a picture of (width, height), after short side to `size` and centre crop.

    Raises Reject (bad_regions) for anything but a list of boxes of four or five numbers.
    """
    regions = np.zeros((REGIONS, 5), np.float32)
    if boxes is None:
        return regions
    try:
        given = [[float(value) for value in box] for box in boxes][:REGIONS]
        if any(len(box) not in (4, 5) or not np.isfinite(box).all() for box in given):
            raise ValueError("a box has four or five finite numbers")
    except (TypeError, ValueError) as fault:
        raise Reject("bad_regions", str(fault)) from fault
    scale = size / min(picture)
    left, top = ((round(side * scale) - size) // 2 for side in picture)
    for place, box in enumerate(given):
        corners = np.array(box[:4]) * scale - [left, top, left, top]
        regions[place] = [*np.clip(corners, 0, size), box[4] if len(box) == 5 else 1.0]
    return regions
