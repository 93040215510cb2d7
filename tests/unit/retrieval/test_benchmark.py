"""The benchmark in small: every phase, kept and gone on with, and figures that hold together."""

from pathlib import Path

import numpy as np
import pytest

from megacm3.errors import ConfigError, DataError
from megacm3.files import read_json
from megacm3.retrieval.bank import MemoryBank
from megacm3.retrieval.benchmark import PHASES, benchmark_retrieval, report
from megacm3.retrieval.benchmark_data import BenchmarkData

ROOT = Path(__file__).resolve().parents[3]
SMALL = BenchmarkData((str(ROOT / "examples" / "data" / "heldout-*.tar"),), 1500, 40, 32, steps=3)


@pytest.mark.long
def test_all_phases(tmp_path):
    said: list[str] = []
    some = benchmark_retrieval(tmp_path, SMALL, "IVF16,SQ8", said.append, ("vectors", "build"))
    assert list(some) == ["vectors", "build"]
    kept = read_json(tmp_path / "results" / "vectors.json")
    found = benchmark_retrieval(tmp_path, SMALL, "IVF16,SQ8", said.append)
    assert list(found) == list(PHASES) and found["vectors"] == kept
    assert kept["pairs"] == 20 and kept["held_out_pairs"] == 5
    documents = np.load(tmp_path / "documents.npy")
    assert documents.shape == (1500, 32)
    assert len(np.unique(documents, axis=0)) > 1490
    np.testing.assert_allclose(np.linalg.norm(documents.astype(np.float32), axis=1), 1, atol=2e-3)
    # The same index, trained on the same vectors: what the bank finds, bare FAISS finds too, but for rounding.
    for kind in ("image", "text"):
        one = found["search"][kind]
        assert abs(one["recall"] - one["recall_bare"]) < 0.1 and one["rate"] > 0
        truth, queries = np.load(tmp_path / f"{kind}_truth.npy"), np.load(tmp_path / f"{kind}_queries.npy")
        exact = np.argsort(-(queries @ documents.T.astype(np.float32)), axis=1)[:, :10]
        assert np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(truth, exact, strict=True)]) > 0.95
    assert found["search"]["nprobe"] == 1
    assert len(MemoryBank.open(tmp_path / "folder", "sha256")) == 1500
    lines = report(found, SMALL)
    assert len(lines) == 5 and "20 real pairs" in lines[0] and " x" in lines[1]
    with pytest.raises(DataError, match="benchmark of other settings"):
        benchmark_retrieval(tmp_path, SMALL, "IVF8,SQ8", said.append)


@pytest.mark.parametrize(
    ("data", "index", "message"),
    [
        (BenchmarkData(()), "IVF16,SQ8", "--input is needed"),
        (BenchmarkData(("x",), documents=10), "IVF16,SQ8", "--documents 10"),
        (BenchmarkData(("x",)), "HNSW32", "--index HNSW32"),
    ],
)
def test_bad_settings_are_refused(tmp_path, data, index, message):
    with pytest.raises(ConfigError, match=message):
        benchmark_retrieval(tmp_path, data, index, print)
