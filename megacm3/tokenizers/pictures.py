"""Pictures prepared once and read many times: what image tokenizer training runs over."""

import logging
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from megacm3.command import progress
from megacm3.data.images import DEFAULT_LIMITS, ImageLimits, Reject, open_image, prepare_image
from megacm3.data.sources import Rejected, Sample, Shard, read_shard
from megacm3.errors import DataError
from megacm3.files import new_file, read_json, write_json

logger = logging.getLogger(__name__)


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
) -> np.ndarray:
    """All pictures of the shards as a mapped uint8 [n, size, size, 3] array in `folder`, made there if it is not yet.

    `job` names the inputs: an array made for another job is made anew. Raises DataError when there is no picture, or
    when more than `max_reject_rate` of the rows are rejected.
    """
    data, facts = folder / "pictures.u8", folder / "pictures.json"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"job": job, "size": size, "most": most}
    if not (data.is_file() and facts.is_file() and wanted.items() <= read_json(facts).items()):
        rejects: Counter[str] = Counter()
        count = 0
        with new_file(data) as temporary, open(temporary, "wb") as file:
            for pixels in progress(
                _pixels(shards, size, limits, threads, rejects), unit=" pictures", description="prepare"
            ):
                file.write(pixels.tobytes())
                count += 1
                if count == most:
                    break
        refused = sum(rejects.values())
        reasons = ", ".join(f"{n} {reason}" for reason, n in rejects.most_common())
        if refused:
            logger.info("%d rows rejected: %s", refused, reasons)
        if refused > max_reject_rate * (count + refused):
            raise DataError(f"{refused} of {count + refused} rows rejected ({reasons}), above --max-reject-rate")
        if count == 0:
            raise DataError("the inputs hold no picture; check --input")
        write_json(facts, wanted | {"count": count})
    return np.memmap(data, np.uint8, "r", shape=(read_json(facts)["count"], size, size, 3))


def _pixels(
    shards: list[Shard], size: int, limits: ImageLimits, threads: int, rejects: Counter[str]
) -> Iterator[np.ndarray]:
    def one(data: bytes) -> np.ndarray | Reject:
        try:
            return prepare_image(open_image(data, limits), size)
        except Reject as reject:
            return reject

    waiting: deque[Future[np.ndarray | Reject]] = deque()

    def ready(leave: int) -> Iterator[np.ndarray]:
        while len(waiting) > leave:
            result = waiting.popleft().result()
            if isinstance(result, Reject):
                rejects[result.reason] += 1
            else:
                yield result

    with ThreadPoolExecutor(threads) as pool:
        for item in _items(shards):
            if isinstance(item, Rejected):
                rejects[item.reason] += 1
                continue
            waiting.extend(pool.submit(one, part) for part in item.parts if isinstance(part, bytes))
            yield from ready(4 * threads)
        yield from ready(0)


def _items(shards: list[Shard]) -> Iterator[Sample | Rejected]:
    for shard in shards:
        yield from read_shard(shard)
