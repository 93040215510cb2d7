"""Recall against exact search, and the number of lists that is chosen by it."""

from pathlib import Path

import numpy as np
import pytest

from megacm3.retrieval.bank import Embeddings, part_file
from megacm3.retrieval.index import new_index
from megacm3.retrieval.recall import AIM, TARGET_RECALL, exact_search, measure_recall, overlap
from megacm3.retrieval.shards import FaissShards, write_shard

COUNT, DIM = 6000, 8
IDS = np.arange(COUNT) * 3 + 1


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory) -> Embeddings:
    folder = tmp_path_factory.mktemp("embeddings")
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(COUNT, DIM))
    for kind in ("image", "text"):
        vectors = shared + 0.2 * rng.normal(size=(COUNT, DIM))
        path = part_file(folder, kind, 0)
        path.parent.mkdir(parents=True)
        np.save(path, (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16))
    return Embeddings(folder, [COUNT])


def shards_of(embeddings: Embeddings, path: Path, factory: str) -> FaissShards:
    vectors = embeddings.documents(np.arange(COUNT))
    index = new_index(factory, DIM)
    index.train(vectors)
    write_shard(path, index, [(IDS, vectors)])
    return FaissShards([path])


def worst(measured: dict) -> list[float]:
    return [min(found.values()) for found in measured["by_nprobe"].values()]


def test_exact_answers_are_those_of_all_products(embeddings):
    queries = embeddings.take("text", np.arange(7))
    products = queries @ embeddings.documents(np.arange(COUNT)).T
    expected = IDS[np.argsort(-products, axis=1)[:, :5]]
    found = exact_search(queries, embeddings, IDS, 5)
    assert np.array_equal(found, expected) and overlap(found, expected) == 1
    assert overlap(np.full_like(found, -1), expected) == 0


def test_the_fewest_lists_that_reach_the_aim_are_chosen(tmp_path, embeddings):
    # So many lists that exact codes reach the aim with fewer than a sixteenth.
    index = shards_of(embeddings, tmp_path / "s", "IVF512,Flat")
    measured = measure_recall(index, embeddings, IDS, 0, 0)
    chosen = measured["nprobe"]
    assert 1 < chosen <= 32 and index.nprobe == chosen == int(list(measured["by_nprobe"])[-1])
    assert worst(measured)[-1] >= AIM > max(worst(measured)[:-1]) and AIM > TARGET_RECALL
    # What it says is what a search finds.
    queries = embeddings.take("text", np.arange(COUNT))
    again = overlap(index.search(queries, 10)[1], exact_search(queries, embeddings, IDS, 10))
    assert abs(again - measured["recall_at_10"]["text"]) < 0.02


def test_lists_that_gain_nothing_are_not_searched(tmp_path, embeddings, caplog):
    # 4 bits of 4 parts lose half of the neighbours, however many lists are read.
    index = shards_of(embeddings, tmp_path / "s", "IVF256,PQ4x4")
    measured = measure_recall(index, embeddings, IDS, 0, 0)
    assert list(measured["by_nprobe"]) == ["1", "2", "4", "8", "16"]
    enough = [found >= max(worst(measured)) - 0.002 for found in worst(measured)]
    assert measured["nprobe"] == index.nprobe == 2 ** enough.index(True) and max(worst(measured)) < TARGET_RECALL
    assert "a finer --index or a higher --nprobe" in caplog.text


def test_a_number_of_lists_that_was_given_is_taken(tmp_path, embeddings):
    index = shards_of(embeddings, tmp_path / "s", "IVF64,Flat")
    assert measure_recall(index, embeddings, IDS, 3, 0)["nprobe"] == 3
    assert measure_recall(index, embeddings, IDS, 1000, 0)["nprobe"] == 64
