"""What the loader costs: opening a hundred million documents, and the tokens a second of one process."""

import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacm3.command import seed_from
from megacm3.data.store import Store, part_name
from megacm3.data.synthetic import RandomNeighbours, SyntheticStore
from megacm3.files import write_manifest

PART, PARTS = 1_000_000, 100
"""Documents of a part, and parts."""
_NEIGHBOURS = 3
_LENGTH = 4352
"""Tokens of a sequence: four pictures of 1,024 codes with their captions."""
_FIRST = 2000
"""Sequence that measuring starts at, away from the stream's begin."""


def large_store(root: Path) -> Path:
    """A store of a hundred million caption-picture pairs: one real index under a hundred names, token files of holes.

    Every token reads as 0; on disk it takes 42 MB.
    """
    (root / "tokens").mkdir(parents=True)
    rng = np.random.default_rng(seed_from("large store"))
    lengths = np.full(2 * PART, 1024, np.int32)
    lengths[::2] = rng.integers(8, 60, PART)
    pointers = np.concatenate([[0], np.cumsum(2 * lengths[:-1].astype(np.int64))])
    index, data = root / "tokens" / f"{part_name(0)}.idx", root / "tokens" / f"{part_name(0)}.bin"
    with open(index, "wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 2 * PART, PART + 1))
        for array in (lengths, pointers, np.arange(0, 2 * PART + 1, 2), np.tile(np.array([0, 1], np.int8), PART)):
            file.write(array.tobytes())
    with open(data, "wb") as file:
        file.truncate(int(pointers[-1]) + 2 * int(lengths[-1]))
    files = {}
    for part in range(PARTS):
        for path in (index, data):
            name = root / "tokens" / f"{part_name(part)}{path.suffix}"
            if part:
                os.link(path, name)
            files[f"tokens/{name.name}"] = {"bytes": path.stat().st_size, "sha256": "0" * 64}
    row = int(np.argmax(lengths[::2]))
    counts = {"documents": PART, "sequences": 2 * PART, "tokens": int(lengths.sum()), "rejects": 0}
    one = counts | {"longest": int(lengths[2 * row]) + 1028, "longest_row": row}
    sizes = {"text_size": 56320, "codebook_size": 8192, "image_tokens": 1024, "image_size": 256, "dtype": "uint16"}
    totals = {"documents": PART * PARTS, "tokens": one["tokens"] * PARTS, "rejects": 0, "parts": [one] * PARTS}
    write_manifest(root, "store", sizes | totals, {}, files)
    return root


def anonymous_megabytes() -> float:
    """Anonymous memory of this process, from Linux's /proc."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1e3


def opening(folder: Path) -> tuple[float, float]:
    """Processor seconds from the config to the first sequence of the store in `folder`, and megabytes that it took,
    a far sequence included.
    """
    from megacm3.data.build import build_stream
    from megacm3.resolve import load_config

    mixture = f"data.mixture=[{{store: {folder}}}]"
    overrides = [mixture, "model.preset=cm3leon_350m", "data.packing=whole", f"model.sequence_length={_LENGTH}"]
    config = load_config(None, overrides)
    before, began = anonymous_megabytes(), time.process_time()
    stream = build_stream(config)
    stream.sequence(0)
    seconds = time.process_time() - began
    stream.sequence(10**9)
    assert len(stream.sources[0].store) == PART * PARTS
    return seconds, anonymous_megabytes() - before


def made_up_store(path: Path) -> SyntheticStore:
    """A hundred million pairs whose ids lie in one array, written to `path` and mapped from there."""
    np.random.default_rng(seed_from("tokens")).integers(0, 8192, 4_000_000, dtype=np.uint16).tofile(path)
    return SyntheticStore(PART * PARTS, np.asarray(np.memmap(path, np.uint16, "r")), 1024, (8, 60))


def stream_rate(store: Any, packing: str, sequences: int = 600) -> float:
    """Tokens a processor second of `store`'s stream: pairs with 1,024 codes, CM3, three retrieved documents each."""
    from megacm3.data.mixture import Mixture, Stage
    from megacm3.data.stream import Stream
    from megacm3.data.windows import Source, StreamSettings
    from megacm3.tokenizers.vocabulary import Vocabulary

    source = Source("measured", store, RandomNeighbours(len(store), _NEIGHBOURS))
    mixture = Mixture([len(store)], [Stage(0, (1.0,))], seed=0)
    stream = Stream([source], mixture, Vocabulary.cm3leon(), StreamSettings(_LENGTH, packing=packing))
    began = time.process_time()
    tokens = sum(len(stream.sequence(number).tokens) - 1 for number in range(_FIRST, _FIRST + sequences))
    return tokens / (time.process_time() - began)


@dataclass(frozen=True)
class LoaderTiming:
    """What was measured."""

    seconds: float
    """Processor time from the config to the first sequence."""
    megabytes: float
    """Anonymous memory that it took."""
    rates: dict[tuple[str, str], float]
    """Tokens a processor second by (packing, store): "files", or "made up", without files and checks."""


def benchmark_loader(work: Path, rounds: int = 3) -> LoaderTiming:
    """Open the large store, then take sequences from it and from made-up documents in turns; best of `rounds`.

    Files go below `work`.
    """
    folder = large_store(work / "store")
    seconds, megabytes = opening(folder)
    made_up = made_up_store(work / "tokens.bin")
    rates: dict[tuple[str, str], float] = {}
    for _ in range(rounds):
        for packing in ("whole", "blocks"):
            for name, store in (("files", Store.open(folder)), ("made up", made_up)):
                rate = stream_rate(store, packing)
                rates[packing, name] = max(rate, rates.get((packing, name), 0.0))
    return LoaderTiming(seconds, megabytes, rates)
