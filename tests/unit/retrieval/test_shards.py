"""Shards of faiss: right ids from every arrangement of them, and each fault of faiss kept out."""

import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest

from megacm3.errors import ConfigError, DataError
from megacm3.retrieval.index import faiss_threads, inverted_lists, load_faiss, new_index, training_rows
from megacm3.retrieval.shards import FaissShards, merge, merge_shards, write_shard

COUNT, DIM = 3000, 24
IDS = np.arange(COUNT) * 7 + 3
"""Document numbers with gaps, so that a position is never taken for one."""


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(60, DIM))
    found = centres[rng.integers(60, size=COUNT)] + 0.5 * rng.normal(size=(COUNT, DIM))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def build(folder: Path, factory: str, vectors: np.ndarray, shards: int = 3) -> tuple[Path, list[Path]]:
    folder.mkdir(parents=True, exist_ok=True)
    index = new_index(factory, DIM)
    if training_rows(len(vectors), index):
        index.train(vectors)
    load_faiss().write_index(index, str(folder / "trained.faiss"))
    paths = [folder / f"s{n}.faiss" for n in range(shards)]
    for n, path in enumerate(paths):
        # Not in order: shard n holds every third vector.
        write_shard(path, index, [(IDS[: len(vectors)][n::shards], vectors[n::shards])])
    return folder / "trained.faiss", paths


def exact(queries: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    return IDS[np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :k]]


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), truth.tolist(), strict=True)]))


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_flat_shards_answer_as_exact_search_does(tmp_path, vectors, shards):
    index = FaissShards(build(tmp_path, "Flat", vectors, shards)[1])
    scores, ids = index.search(vectors[:50], 10)
    assert np.array_equal(ids, exact(vectors[:50], vectors, 10))
    assert scores.dtype == np.float32 and (np.diff(scores, axis=1) <= 0).all()
    assert np.array_equal(index.ids(), IDS) and index.size == COUNT and index.dim == DIM


@pytest.mark.parametrize("factory", ["IVF32,SQ8", "IVF32,SQfp16", "IVF32,Flat", "PCA20,IVF32,SQ8", "IVF32_HNSW32,SQ8"])
def test_inverted_files_find_the_right_documents_in_any_number_of_shards(tmp_path, vectors, factory):
    one = FaissShards(build(tmp_path / "1", factory, vectors, 1)[1], nprobe=16)
    many = FaissShards(build(tmp_path / "3", factory, vectors, 3)[1], nprobe=16)
    found = many.search(vectors[:200], 10)
    # R1: numbers are the given ones, whatever the shard; R2: inner products with residuals keep their recall.
    assert set(found[1].ravel()) <= set(IDS.tolist())
    assert recall(found[1], exact(vectors[:200], vectors, 10)) > (0.7 if factory.startswith("PCA") else 0.95)
    assert np.array_equal(found[1], one.search(vectors[:200], 10)[1])
    assert np.array_equal(many.ids(), IDS)


def test_eight_bits_keep_more_neighbours_of_what_the_centroids_leave(tmp_path):
    # Tight groups: the difference to a group's centre is a tenth of the whole vector.
    rng = np.random.default_rng(1)
    near = np.repeat(rng.normal(size=(32, DIM)), 60, 0) + 0.1 * rng.normal(size=(32 * 60, DIM))
    vectors = (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float32)
    found = {}
    for residual in (True, False):
        trained = new_index("IVF32,SQ8", DIM)
        assert inverted_lists(trained).by_residual is True
        trained.by_residual = residual
        trained.train(vectors)
        write_shard(tmp_path / "s", trained, [(IDS[: len(vectors)], vectors)])
        ids = FaissShards([tmp_path / "s"], nprobe=4).search(vectors[::7], 10)[1]
        found[residual] = recall(ids, exact(vectors[::7], vectors, 10))
    assert found[True] > found[False] + 0.05 > 0.75


def test_queries_are_shared_by_threads(tmp_path, vectors):
    index = FaissShards(build(tmp_path, "IVF32,SQ8", vectors, 1)[1], nprobe=32)
    queries = np.repeat(vectors, 20, 0)
    spent: dict[int, float] = {}
    with faiss_threads(2):
        for sign in (-1, 1):
            for thread in psutil.Process().threads():
                spent[thread.id] = spent.get(thread.id, 0) + sign * thread.user_time
            if sign < 0:
                index.search(queries, 10)
    # CPU time, not the clock: two threads have worked, however busy the machine is.
    assert sorted(spent.values())[-2] > 0.25 * sum(spent.values()) > 0


@pytest.mark.parametrize("factory", ["Flat", "IVF32,SQ8", "PCA20,IVF32,SQ8"])
def test_an_answer_does_not_depend_on_the_other_queries(tmp_path, vectors, factory):
    index = FaissShards(build(tmp_path, factory, vectors)[1], nprobe=8)
    together = index.search(vectors[:40], 10)
    alone = [index.search(vectors[n : n + 1], 10) for n in range(40)]
    assert np.array_equal(together[1], np.concatenate([ids for _, ids in alone]))
    np.testing.assert_allclose(together[0], np.concatenate([scores for scores, _ in alone]), atol=1e-6)


def test_answers_do_not_depend_on_threads(tmp_path, vectors):
    index = FaissShards(build(tmp_path, "IVF32,SQ8", vectors)[1], nprobe=8)
    answers = []
    for count in (1, 3):
        with faiss_threads(count):
            answers.append(index.search(vectors[:100], 10))
    assert all(np.array_equal(a, b) for a, b in zip(*answers, strict=True))


def test_excluded_documents_never_come_back_from_any_shard(tmp_path, vectors):
    for factory in ("Flat", "IVF32,SQ8", "PCA20,IVF32,SQ8"):
        index = FaissShards(build(tmp_path / factory, factory, vectors)[1], nprobe=32)
        best = index.search(vectors[:5], 3)[1]
        again = index.search(vectors[:5], 3, exclude=best.ravel())[1]
        assert not set(again.ravel().tolist()) & set(best.ravel().tolist()) and (again >= 0).all()


def test_fewer_hits_than_asked_are_padded(tmp_path, vectors):
    index = FaissShards(build(tmp_path, "IVF8,Flat", vectors[:40])[1], nprobe=1)
    scores, ids = index.search(vectors[:3], 40)
    missing = ids < 0
    assert missing.any() and (scores[missing] == -np.inf).all() and np.isfinite(scores[~missing]).all()
    assert all((row[np.argmax(gone) :] < 0).all() for row, gone in zip(ids, missing, strict=True) if gone.any())


def test_equal_scores_come_in_the_order_of_their_numbers():
    one = np.float32([[0.5, 0.4]]), np.array([[9, 1]])
    other = np.float32([[0.5, -3e38]]), np.array([[2, -1]])
    scores, ids = merge(one, other, 4)
    assert ids.tolist() == [[2, 9, 1, -1]] and scores[0, 3] == -np.inf


def test_a_merged_index_moves_with_its_data_and_prints_nothing(tmp_path, vectors, capfd):
    trained, paths = build(tmp_path / "a", "IVF32,SQ8", vectors)
    merge_shards(trained, paths, tmp_path / "a" / "merged.faiss")
    shutil.move(tmp_path / "a", tmp_path / "b")
    index = FaissShards([tmp_path / "b" / "merged.faiss"], nprobe=8)
    shards = FaissShards([tmp_path / "b" / path.name for path in paths], nprobe=8)
    assert np.array_equal(index.search(vectors[:100], 10)[1], shards.search(vectors[:100], 10)[1])
    assert np.array_equal(index.ids(), IDS)
    assert capfd.readouterr().out == ""


def test_merging_twice_in_other_places_gives_the_same_bytes(tmp_path, vectors):
    files = []
    for name in ("x", "a longer name"):
        trained, paths = build(tmp_path / name, "IVF32,SQ8", vectors)
        merge_shards(trained, paths, tmp_path / name / "merged.faiss")
        files.append([(tmp_path / name / f"merged.{end}").read_bytes() for end in ("faiss", "ivfdata")])
    assert files[0] == files[1]


def test_an_index_that_cannot_be_merged_says_so(tmp_path, vectors):
    trained, paths = build(tmp_path, "IVF8,PQ4x4fs", vectors[:800])
    with pytest.raises(ConfigError, match="--merge"):
        merge_shards(trained, paths, tmp_path / "merged.faiss")


def test_nothing_can_be_added_to_an_opened_index(tmp_path, vectors):
    index = FaissShards(build(tmp_path, "Flat", vectors[:100])[1])
    assert not any(hasattr(index, name) for name in ("add", "add_with_ids", "remove_ids", "train"))


def test_a_full_disk_is_one_line(vectors):
    with pytest.raises(DataError, match="/dev/full cannot be written"):
        write_shard(Path("/dev/full"), new_index("Flat", DIM), [(IDS[: len(vectors)], vectors)])


def test_empty_shards_and_vectors_that_are_no_numbers_are_refused(tmp_path, vectors):
    index = new_index("Flat", DIM)
    with pytest.raises(DataError, match="empty shard"):
        write_shard(tmp_path / "s", index, [])
    broken = vectors[:3].copy()
    broken[1, 2] = np.nan
    with pytest.raises(DataError, match="not finite"):
        write_shard(tmp_path / "s", index, [(IDS[:3], broken)])
    load_faiss().write_index(index, str(tmp_path / "s"))
    with pytest.raises(DataError, match="empty shard"):
        FaissShards([tmp_path / "s"])


@pytest.mark.parametrize("factory", ["Flat", "IVF8,SQ8"])
def test_a_truncated_or_missing_shard_is_refused(tmp_path, vectors, factory):
    _, paths = build(tmp_path, factory, vectors[:400])
    data = paths[1].read_bytes()
    for size in (len(data) - 100, len(data) // 2, 3, 0):
        paths[1].write_bytes(data[:size])
        with pytest.raises(DataError, match=r"s1\.faiss"):
            FaissShards(paths)
    paths[1].unlink()
    with pytest.raises(DataError, match="missing"):
        FaissShards(paths)


def test_shards_of_different_kinds_are_refused(tmp_path, vectors):
    _, flat = build(tmp_path / "flat", "Flat", vectors[:100])
    _, listed = build(tmp_path / "ivf", "IVF4,Flat", vectors[:200])
    with pytest.raises(DataError, match="differ"):
        FaissShards([flat[0], listed[0]])


@pytest.mark.parametrize("factory", ["Flat", "IVF32,SQ8", "PCA16,IVF32,SQ8"])
def test_threads_do_not_change_a_byte_of_a_shard(tmp_path, vectors, factory):
    build(tmp_path, factory, vectors, shards=1)
    trained = load_faiss().read_index(str(tmp_path / "trained.faiss"))
    blocks = [(IDS[n : n + 400], vectors[n : n + 400]) for n in range(0, COUNT, 400)]
    for threads in (1, 3):
        write_shard(tmp_path / f"{threads}.faiss", trained, iter(blocks), threads)
    assert (tmp_path / "1.faiss").read_bytes() == (tmp_path / "3.faiss").read_bytes()
    # And the answers are those of vectors that faiss placed itself.
    plain = load_faiss().clone_index(trained)
    plain.add_with_ids(vectors, IDS)
    load_faiss().write_index(plain, str(tmp_path / "plain.faiss"))
    ours, faiss_own = (FaissShards([tmp_path / name]).search(vectors[:50], 5) for name in ("1.faiss", "plain.faiss"))
    np.testing.assert_array_equal(ours[1], faiss_own[1])
    np.testing.assert_allclose(ours[0], faiss_own[0], atol=1e-6)
