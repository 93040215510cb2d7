"""A hundred million documents: start-up time and memory do not depend on their number, and the stream is fast."""

import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from megacm3.data.build import build_stream
from megacm3.data.mixture import Mixture, Stage
from megacm3.data.store import part_name
from megacm3.data.stream import Stream
from megacm3.data.synthetic import RandomNeighbours, SyntheticStore
from megacm3.data.windows import Source, StreamSettings
from megacm3.files import write_manifest
from megacm3.resolve import load_config
from megacm3.tokenizers.vocabulary import Vocabulary

PART, PARTS = 1_000_000, 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 100 parts of a million pairs: one real index under a hundred names, data files that are all holes."""
    root = tmp_path_factory.mktemp("scale") / "store"
    (root / "tokens").mkdir(parents=True)
    rng = np.random.default_rng(0)
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
    part = counts | {"longest": int(lengths[2 * row]) + 1028, "longest_row": row}
    sizes = {"text_size": 56320, "codebook_size": 8192, "image_tokens": 1024, "image_size": 256, "dtype": "uint16"}
    totals = {"documents": PART * PARTS, "tokens": part["tokens"] * PARTS, "rejects": 0, "parts": [part] * PARTS}
    write_manifest(root, "store", sizes | totals, {}, files)
    return root


def anonymous() -> float:
    """Anonymous memory of this process in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1e3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_opening_a_hundred_million_documents(folder: Path) -> None:
    mixture = f"data.mixture=[{{store: {folder}}}]"
    overrides = [mixture, "model.preset=cm3leon_350m", "data.packing=whole", "model.sequence_length=4352"]
    config = load_config(None, overrides)
    before, start = anonymous(), time.process_time()  # as below, for tests run beside each other
    stream = build_stream(config)
    stream.sequence(0)
    opened = time.process_time() - start
    stream.sequence(10**9)
    print(f"100M documents: first sequence after {opened:.2f} s, {anonymous() - before:.0f} MB of anonymous memory")
    assert len(stream.sources[0].store) == 100_000_000
    assert opened < 5 and anonymous() - before < 500


@pytest.mark.parametrize("packing", ["whole", "blocks"])
def test_two_million_tokens_a_second(tmp_path: Path, packing: str) -> None:
    # 1,024-code pictures, CM3, three retrieved documents. By the processor's clock: tests run beside each other.
    path = tmp_path / "tokens.bin"
    np.random.default_rng(0).integers(0, 8192, 4_000_000, dtype=np.uint16).tofile(path)
    store = SyntheticStore(10**8, np.asarray(np.memmap(path, np.uint16, "r")), 1024, (8, 60))
    source = Source("synthetic", store, RandomNeighbours(10**8, 3))
    mixture = Mixture([10**8], [Stage(0, (1.0,))], seed=0)
    stream = Stream([source], mixture, Vocabulary.cm3leon(), StreamSettings(4352, packing=packing))
    start = time.process_time()
    tokens = sum(len(stream.sequence(number).tokens) - 1 for number in range(2000, 2600))
    rate = tokens / (time.process_time() - start)
    print(f"{packing}: {rate / 1e6:.1f}M tokens/s")
    assert rate > 2e6
