"""Banks behind other indexes than FAISS: the real packages, and for Pinecone's service a stand-in on this machine."""

import shutil
import sys

import numpy as np
import pytest

from megacm3.errors import ConfigError, DataError
from megacm3.retrieval import backends
from megacm3.retrieval.bank import MemoryBank
from megacm3.retrieval.build_bank import build_bank
from megacm3.retrieval.find_neighbours import find_neighbours
from megacm3.retrieval.options import NeighbourOptions
from megacm3.retrieval.verify import verify_bank
from tests.unit.retrieval.conftest import flip
from tests.unit.retrieval.makers import DIM
from tests.unit.retrieval.pinecone_stand_in import KEY, stand_in

PACKAGES = {"annoy": "annoy", "milvus": "milvus_lite", "pinecone": "pinecone"}


@pytest.fixture(scope="module")
def service():
    with stand_in(DIM) as running:
        yield running


@pytest.fixture(scope="module", params=list(PACKAGES))
def other(request, made, tmp_path_factory):
    """(backend, bank) for each backend whose package is installed."""
    backend = request.param
    pytest.importorskip(PACKAGES[backend], reason=f"{backend}: pip install -e '.[{backend}]'")
    flags = {}
    with pytest.MonkeyPatch.context() as patch:
        if backend == "pinecone":
            patch.setenv("PINECONE_API_KEY", KEY)
            flags["server"] = request.getfixturevalue("service").address
        output = tmp_path_factory.mktemp(backend) / "bank"
        build_bank(made.bank_options(output, backend=backend, **flags))
        bank = MemoryBank.open(output, "sha256")
        yield backend, bank
        backends.close(bank.index)


def exact(bank: MemoryBank, queries: np.ndarray, k: int, exclude=()) -> tuple[np.ndarray, np.ndarray]:
    ids = np.asarray(bank.metadata.doc_ids)
    scores = queries @ bank.embeddings.documents(np.arange(len(bank))).T
    scores[:, np.isin(ids, exclude)] = -np.inf
    order = np.lexsort((np.broadcast_to(ids, scores.shape), -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), ids[order]


def test_answers_are_those_of_exact_search(other):
    _, bank = other
    queries = bank.embeddings.take("text", np.arange(20))
    scores, ids = bank.search(queries, 5)
    expected, expected_ids = exact(bank, queries, 5)
    np.testing.assert_allclose(scores, expected, atol=2e-3)
    assert scores.dtype == np.float32
    assert ids.dtype == np.int64
    # Twin documents may change places.
    assert (ids == expected_ids).mean() > 0.9


def test_excluded_documents_are_in_no_answer(other):
    _, bank = other
    queries = bank.embeddings.documents(np.arange(10))
    _, ids = bank.search(queries, 1)
    out = np.unique(ids)
    scores, ids = bank.search(queries, 4, exclude=out)
    assert not np.isin(ids, out).any()
    np.testing.assert_allclose(scores, exact(bank, queries, 4, out)[0], atol=2e-3)


def test_more_hits_than_documents_are_filled_up(other):
    _, bank = other
    scores, ids = bank.search(bank.embeddings.documents(np.arange(2)), len(bank) + 3)
    assert (ids[:, len(bank) :] == -1).all()
    assert np.isneginf(scores[:, len(bank) :]).all()
    for row in ids:
        np.testing.assert_array_equal(np.sort(row[: len(bank)]), bank.metadata.doc_ids)


def test_queries_of_another_width_are_refused(other):
    _, bank = other
    with pytest.raises(DataError, match="width"):
        bank.search(np.zeros((1, DIM + 1), np.float32), 1)


def test_the_manifest_names_the_backend_and_recall(other):
    backend, bank = other
    assert bank.settings["backend"] == backend
    assert min(bank.settings["recall"].values()) > 0.95


def test_a_second_run_finds_it_finished(other, made):
    backend, bank = other
    flags = {"server": bank.settings["server"]} if backend == "pinecone" else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PINECONE_API_KEY", KEY)
        assert build_bank(made.bank_options(bank.folder, backend=backend, **flags)).seconds == 0


def test_a_bank_is_verified_with_its_own_vectors(tmp_path, made):
    pytest.importorskip("annoy", reason="annoy: pip install -e '.[annoy]'")
    for name in ("one", "two"):
        build_bank(made.bank_options(tmp_path / name, backend="annoy"))
    assert verify_bank(tmp_path / "one").found_first == 1.0
    trees = [(tmp_path / name / "index" / "trees.annoy").read_bytes() for name in ("one", "two")]
    assert trees[0] == trees[1]


def test_neighbours_come_from_any_backend(tmp_path, made):
    pytest.importorskip("annoy", reason="annoy: pip install -e '.[annoy]'")
    build_bank(made.bank_options(tmp_path / "bank", backend="annoy"))
    given = {"block": 20, "search": 32, "keep": 8, "duplicate": 0.999, "workers": 1}
    found = find_neighbours(NeighbourOptions(str(tmp_path / "bank"), str(tmp_path / "neighbours"), **given))
    assert found.with_image == found.with_text == 50


@pytest.mark.parametrize("kind", ["IVF_FLAT", "HNSW"])
def test_milvus_takes_its_own_kinds_of_index(tmp_path, made, kind):
    pytest.importorskip("milvus_lite", reason="milvus: pip install -e '.[milvus]'")
    build_bank(made.bank_options(tmp_path / "bank", backend="milvus", index=kind))
    bank = MemoryBank.open(tmp_path / "bank")
    _, ids = bank.search(bank.embeddings.documents(np.arange(10)), 1)
    assert (ids[:, 0] == bank.metadata.doc_ids[:10]).mean() >= 0.9
    backends.close(bank.index)


def test_milvus_lite_survives_a_move_and_knows_when_it_lost_its_data(tmp_path, made):
    pytest.importorskip("milvus_lite", reason="milvus: pip install -e '.[milvus]'")
    build_bank(made.bank_options(tmp_path / "bank", backend="milvus"))
    shutil.move(tmp_path / "bank", tmp_path / "moved")
    bank = MemoryBank.open(tmp_path / "moved", "sha256")
    _, ids = bank.search(bank.embeddings.documents(np.arange(1)), 1)
    assert ids[0, 0] == bank.metadata.doc_ids[0]
    backends.close(bank.index)
    shutil.rmtree(tmp_path / "moved" / "index" / "milvus.db")
    with pytest.raises(DataError, match="missing"):
        MemoryBank.open(tmp_path / "moved")


def test_milvus_lite_in_two_hands_is_refused_in_words(tmp_path, made):
    pytest.importorskip("milvus_lite", reason="milvus: pip install -e '.[milvus]'")
    from milvus_lite.db import MilvusLite

    build_bank(made.bank_options(tmp_path / "bank", backend="milvus"))
    other = MilvusLite(str(tmp_path / "bank" / "index" / "milvus.db"))
    try:
        with pytest.raises(DataError, match="another process may hold it"):
            MemoryBank.open(tmp_path / "bank")
    finally:
        other.close()


def test_a_damaged_annoy_file_is_refused(tmp_path, made):
    pytest.importorskip("annoy", reason="annoy: pip install -e '.[annoy]'")
    build_bank(made.bank_options(tmp_path / "bank", backend="annoy"))
    path = tmp_path / "bank" / "index" / "trees.annoy"
    flip(path)
    with pytest.raises(DataError, match=r"trees\.annoy"):
        MemoryBank.open(tmp_path / "bank", "sha256")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"trees\.annoy"):
        MemoryBank.open(tmp_path / "bank")


def test_pinecone_refusals_are_said_in_one_line(tmp_path, made, service, monkeypatch):
    pytest.importorskip("pinecone", reason="pinecone: pip install -e '.[pinecone]'")
    options = made.bank_options(tmp_path / "bank", backend="pinecone", server=service.address)
    monkeypatch.delenv("PINECONE_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="PINECONE_API_KEY"):
        build_bank(options)
    monkeypatch.setenv("PINECONE_API_KEY", "another key")
    with pytest.raises(DataError, match="Invalid API Key"):
        build_bank(options)
    monkeypatch.setenv("PINECONE_API_KEY", KEY)
    with stand_in(DIM + 1) as wider, pytest.raises(DataError, match=f"width {DIM + 1}; the bank's have {DIM}"):
        build_bank(made.bank_options(tmp_path / "wider", backend="pinecone", server=wider.address))


def test_a_bank_whose_records_were_deleted_is_refused(tmp_path, made, monkeypatch):
    pytest.importorskip("pinecone", reason="pinecone: pip install -e '.[pinecone]'")
    monkeypatch.setenv("PINECONE_API_KEY", KEY)
    with stand_in(DIM) as running:
        build_bank(made.bank_options(tmp_path / "bank", backend="pinecone", server=running.address))
        name = MemoryBank.open(tmp_path / "bank").settings["collection"]
        assert max(size for path, size in running.asked if path == "/vectors/upsert") < 2_000_000
        running.spaces[name].popitem()
        with pytest.raises(DataError, match="the index holds 49 vectors"):
            MemoryBank.open(tmp_path / "bank")
        del running.spaces[name]
        with pytest.raises(DataError, match="no namespace"):
            MemoryBank.open(tmp_path / "bank")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "chroma"}, "--backend chroma; expected one of faiss"),
        ({"backend": "annoy", "server": "http://x"}, "--server is for milvus and pinecone"),
        ({"backend": "pinecone"}, "needs --server"),
        ({"backend": "annoy", "merge": True}, "--merge is for faiss"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, made, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_bank(made.bank_options(tmp_path / "bank", **changes))


def test_a_package_that_is_not_installed_is_named(tmp_path, made, monkeypatch):
    monkeypatch.setitem(sys.modules, "annoy", None)
    with pytest.raises(ConfigError, match=r"needs the package annoy.*pip install -e '\.\[annoy\]'"):
        build_bank(made.bank_options(tmp_path / "bank", backend="annoy"))
