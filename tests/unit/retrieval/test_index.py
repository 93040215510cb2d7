"""Which index a bank gets, and faiss itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from megacm3.errors import ConfigError
from megacm3.retrieval.index import choose_index, default_nprobe, gpu_count, load_faiss, new_index, shard_size


@pytest.mark.parametrize("factory", ["nonsense", "IVF32,RFlat,nothing", "HNSW32", "IVF32,PQ8x4fs,RFlat"])
def test_a_factory_that_cannot_serve_is_refused(factory):
    with pytest.raises(ConfigError, match="--index"):
        new_index(factory, 24)


def test_the_gpus_of_faiss_are_used_where_there_are_any(caplog):
    caplog.set_level("INFO")
    assert gpu_count("cpu") == 0 and not caplog.messages
    found = gpu_count("cuda")
    has = hasattr(load_faiss(), "StandardGpuResources")
    assert (found > 0) == (has and load_faiss().get_num_gpus() > 0)
    assert len(caplog.messages) == 1 and ("sees no GPU" in caplog.text) == (found == 0)


def test_shards_are_few_and_shared_by_workers():
    sizes = {count: shard_size(count) for count in (1, 1_000_000, 10**8, 10**9, 5 * 10**9)}
    assert sizes == {1: 2**20, 1_000_000: 2**20, 10**8: 2**21, 10**9: 2**24, 5 * 10**9: 2**24}


def test_the_rule_of_sizes():
    # autofaiss's thresholds (notes of the room); never more lists than there are 39 vectors for.
    expected = {
        1: "Flat",
        999: "Flat",
        9999: "Flat",
        10_000: "IVF256,SQfp16",
        60_000: "IVF1024,SQfp16",
        1_000_000: "IVF4096,SQ8",
        5_000_000: "IVF16384,SQ8",
        100_000_000: "IVF65536_HNSW32,SQ8",
        1_000_000_000: "IVF131072_HNSW32,SQ8",
    }
    assert {size: choose_index(size) for size in expected} == expected
    assert default_nprobe(4096) == 256 and default_nprobe(8) == 1


def test_faiss_is_new_enough_and_comes_after_torch():
    # R15: reading of index files was hardened in 1.15. The other order of imports has crashed processes.
    assert tuple(int(part) for part in load_faiss().__version__.split(".")[:2]) >= (1, 15)
    code = (
        "from megacm3.retrieval.index import load_faiss; import sys; assert 'torch' not in sys.modules;"
        "load_faiss(); import torch; assert int(torch.arange(0, 32769)[-1]) == 32768; print('whole')"
    )
    root = Path(__file__).resolve().parents[3]
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert ended.stdout.strip() == "whole", ended.stderr
