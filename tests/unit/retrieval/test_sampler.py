"""Sampling: what may never be drawn never is, whatever the lists say; and the same state draws the same documents."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megacm3.data.store import Store
from megacm3.errors import ConfigError, DataError
from megacm3.files import write_manifest
from megacm3.retrieval.bank import MemoryBank
from megacm3.retrieval.neighbours import KIND, NeighbourTable, alike_dtype, scores_up
from megacm3.retrieval.sampler import RetrievalSampler, open_sampler
from tests.unit.retrieval.makers import DOCUMENTS

KEEP = 4


def rng(*numbers: int) -> np.random.Generator:
    return np.random.default_rng(numbers)


def write_table(
    folder: Path, image, text, alike=(), clusters=None, captions=None, documents=12, doc_ids=None, held_out=()
):
    """A table of one block whose document 0 has the given lists, {doc: score}; all others have none."""
    doc_ids = np.arange(documents) if doc_ids is None else np.asarray(doc_ids)
    lists = {"image": image, "text-0": text}
    order = []
    for name, entries in lists.items():
        ids, scores = np.full((documents, KEEP), -1, np.int32), np.full((documents, KEEP), -np.inf, np.float32)
        ids[0, : len(entries)], scores[0, : len(entries)] = list(entries), list(entries.values())
        order += [*entries, *[None] * (KEEP - len(entries))]
        (folder / name).mkdir(parents=True)
        np.save(folder / name / "part-00000.ids.npy", ids)
        np.save(folder / name / "part-00000.scores.npy", scores_up(scores))
    bits = np.zeros((documents, 2 * KEEP), alike_dtype(KEEP))
    for i, one in enumerate(order):
        bits[0, i] = sum(1 << j for j, other in enumerate(order) if {one, other} in [set(pair) for pair in alike])
    np.save(folder / "text-0" / "part-00000.alike.npy", bits)
    np.save(folder / "doc_ids.npy", doc_ids)
    np.save(folder / "clusters.npy", np.asarray(clusters if clusters is not None else doc_ids))
    np.save(folder / "captions.npy", np.asarray(captions if captions is not None else doc_ids + 100, np.uint64))
    settings = {"documents": documents, "rows": len(doc_ids), "keep": KEEP, "text_variants": 1, "block": documents}
    np.save(folder / "held_out.npy", np.isin(doc_ids, held_out))
    settings |= {"foreign": False, "asking_rows": len(doc_ids)}
    write_manifest(folder, KIND, settings, {"store": "abc"})
    return NeighbourTable.open(folder)


def drawn(table, doc=0, draws=60, **given) -> set[int]:
    sampler = RetrievalSampler(table, **given)
    return {other for n in range(draws) for other in sampler.sample(doc, rng(n))}


IMAGE, TEXT = {1: 0.8, 2: 0.7, 3: 0.6, 4: 0.5}, {5: 0.8, 6: 0.7, 7: 0.6, 8: 0.5}


def test_copies_of_held_out_documents_are_never_drawn(tmp_path):
    table = write_table(tmp_path / "n", IMAGE, TEXT, held_out=(1, 5, 9))
    assert drawn(table) == {2, 3, 6, 7}
    assert drawn(table, mode="random", draws=300) == set(range(1, 12)) - {1, 5, 9}


def test_three_of_the_best_two_and_two_are_drawn(tmp_path):
    sampler = RetrievalSampler(write_table(tmp_path / "n", IMAGE, TEXT))
    found = [tuple(sampler.sample(0, rng(n))) for n in range(400)]
    assert {len(set(row)) for row in found} == {3} and {doc for row in found for doc in row} == {1, 2, 5, 6}
    # Each of the 24 ordered choices, about equally often.
    assert len(Counter(found)) == 24 and max(Counter(found).values()) < 45


def test_the_same_state_draws_the_same(tmp_path):
    sampler = RetrievalSampler(write_table(tmp_path / "n", IMAGE, TEXT))
    sent = pickle.loads(pickle.dumps(sampler))
    assert [sampler.sample(0, rng(n)) for n in range(30)] == [sent.sample(0, rng(n)) for n in range(30)]
    assert all(type(doc) is int for doc in sampler.sample(0, rng(1)))


def test_numbers_of_documents_follow_their_probabilities(tmp_path):
    table = write_table(tmp_path / "n", IMAGE, TEXT)
    sampler = RetrievalSampler(table, (0.1, 0.2, 0.3, 0.4))
    counts = Counter(len(sampler.sample(0, rng(n))) for n in range(2000))
    np.testing.assert_allclose([counts[n] / 2000 for n in range(4)], [0.1, 0.2, 0.3, 0.4], atol=0.04)
    for share, expected in (((1, 0, 0, 0), 0), ((0, 1, 0, 0), 1), ((0, 0, 0, 0, 1), 4)):
        assert {len(RetrievalSampler(table, share).sample(0, rng(n))) for n in range(50)} == {expected}


def test_a_score_above_the_limit_is_never_drawn(tmp_path):
    table = write_table(tmp_path / "n", {1: 0.95, 2: 0.9001, 3: 0.9, 4: 0.2}, {5: 0.99, 6: 0.91, 7: 0.9004, 8: 0.1})
    # 0.9001 is 0.8999 in half precision: rounded up when it was stored.
    assert drawn(table) <= {3, 4, 8} and drawn(table, max_score=1.0) == {1, 2, 5, 6}
    assert drawn(table, max_score=0.05) == set()


def test_neither_the_document_nor_a_copy_nor_its_caption(tmp_path):
    clusters, captions = np.arange(12), np.arange(12) + 100
    clusters[[0, 1]], captions[[0, 5]] = 0, 7
    table = write_table(tmp_path / "m", {0: 0.85, 1: 0.8, 2: 0.7, 3: 0.6}, TEXT, clusters=clusters, captions=captions)
    assert drawn(table) == {2, 3, 6, 7}


def test_candidates_that_are_too_alike_are_not_drawn_together(tmp_path):
    clusters, captions = np.arange(12), np.arange(12) + 100
    clusters[[1, 5]], captions[[2, 6]] = 1, 9
    table = write_table(tmp_path / "n", IMAGE, TEXT, alike=[(1, 7)], clusters=clusters, captions=captions)
    # 5 is a copy of 1, 6 has the caption of 2, 7 resembles 1: 8 is left, and the other list makes up for it.
    assert drawn(table) == {1, 2, 8, 3}
    twice = write_table(tmp_path / "m", IMAGE, {1: 0.8, 2: 0.7, 3: 0.6, 4: 0.5})
    assert drawn(twice) == {1, 2, 3, 4}


def test_a_short_list_is_made_up_for_by_the_other_and_few_are_few(tmp_path):
    assert drawn(write_table(tmp_path / "a", IMAGE, {})) == {1, 2, 3, 4}
    assert drawn(write_table(tmp_path / "b", {}, {5: 0.3, 6: 0.2})) == {5, 6}
    assert drawn(write_table(tmp_path / "c", {}, {})) == set()
    one = RetrievalSampler(write_table(tmp_path / "d", {9: 0.1}, {9: 0.1}))
    assert {tuple(one.sample(0, rng(n))) for n in range(20)} == {(9,)}


def test_random_documents_pass_the_same_filters(tmp_path):
    clusters, captions = np.arange(12), np.arange(12) + 100
    clusters[[0, 1]], captions[[0, 5]] = 0, 7
    table = write_table(tmp_path / "n", IMAGE, TEXT, clusters=clusters, captions=captions)
    assert drawn(table, draws=200, mode="random") == set(range(12)) - {0, 1, 5}
    sampler = RetrievalSampler(table, mode="random")
    assert {len(set(sampler.sample(0, rng(n)))) for n in range(50)} == {3}
    lonely = write_table(tmp_path / "m", {}, {}, documents=2)
    assert RetrievalSampler(lonely, mode="random").sample(0, rng(0)) == [1]
    gaps = write_table(tmp_path / "g", {}, {}, doc_ids=[2, 5, 7, 11])
    assert drawn(gaps, mode="random", draws=100) == {2, 5, 7, 11}


def test_no_documents_in_mode_none(tmp_path):
    assert drawn(write_table(tmp_path / "n", IMAGE, TEXT), mode="none") == set()


@pytest.mark.parametrize("shares", [(), (0.5, 0.4), (1.5, -0.5), (0, 0, 0, 0, 0, 1), (float("nan"), 1)])
def test_probabilities_that_are_none_are_refused(made, shares):
    with pytest.raises(ConfigError, match=r"retrieval\.documents"):
        RetrievalSampler(NeighbourTable.open(made.neighbours), shares)


def test_other_settings_that_cannot_be_are_refused(made):
    table = NeighbourTable.open(made.neighbours)
    with pytest.raises(ConfigError, match=r"retrieval\.mode = best"):
        RetrievalSampler(table, mode="best")
    with pytest.raises(ConfigError, match=r"retrieval\.max_score"):
        RetrievalSampler(table, max_score=float("nan"))
    for mode in ("neighbours", "random", "none"):
        with pytest.raises(DataError, match="document 55 is not in"):
            RetrievalSampler(table, mode=mode).sample(DOCUMENTS, rng(0))


def test_neighbours_of_another_store_are_refused(made):
    store = Store.open(made.store)
    assert open_sampler(made.neighbours, store.fingerprint, len(store)).sample(0, rng(0))
    with pytest.raises(DataError, match=r"neighbours of store .*expected 0000.*find_neighbours"):
        open_sampler(made.neighbours, "0" * 64, len(store))
    with pytest.raises(DataError, match="expected"):
        open_sampler(made.neighbours, store.fingerprint, len(store) + 1)


def test_on_the_real_lists_no_rule_is_ever_broken(made):
    store, bank = Store.open(made.store), MemoryBank.open(made.bank)
    sampler = open_sampler(made.neighbours, store.fingerprint, len(store))
    metadata = sampler.table.metadata
    for doc in range(DOCUMENTS):
        for n in range(5):
            found = sampler.sample(doc, rng(doc, n))
            rows, own = metadata.rows(np.array(found, np.int64)), metadata.rows(np.array([doc]))[0]
            assert (rows >= 0).all() and doc not in found and len(set(found)) == len(found) <= 3
            assert own >= 0 or not found
            if not found:
                continue
            assert metadata.clusters[own] not in metadata.clusters[rows]
            assert metadata.captions[own] not in metadata.captions[rows]
            assert len(set(metadata.clusters[rows].tolist())) == len(found)
            vectors = bank.embeddings.documents(rows)
            alike = vectors @ vectors.T - 2 * np.eye(len(rows))
            assert alike.max() <= 0.9 + 1e-6
            assert (vectors @ bank.embeddings.take("image", np.array([own]))[0]).min() < 0.9
