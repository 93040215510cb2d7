"""Neighbour lists: against exact search, without what may never be drawn, resumable, and checked by recomputing."""

import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest

from megacm3.errors import ConfigError, DataError
from megacm3.files import read_manifest, write_manifest
from megacm3.retrieval.bank import MemoryBank
from megacm3.retrieval.copies import join_clusters
from megacm3.retrieval.encoder import Encoder
from megacm3.retrieval.find_neighbours import find_neighbours
from megacm3.retrieval.jobs import Job
from megacm3.retrieval.neighbour_blocks import plan
from megacm3.retrieval.neighbour_search import drop_tokens
from megacm3.retrieval.neighbours import NeighbourTable, alike_dtype, masks, scores_up
from megacm3.retrieval.train_encoder import EncoderOptions, make_encoder
from megacm3.retrieval.units import run_unit
from megacm3.retrieval.verify import verify_bank, verify_neighbours
from tests.unit.retrieval.conftest import flip, same_bytes
from tests.unit.retrieval.makers import DOCUMENTS, TINY


@pytest.fixture(scope="module")
def bank(made) -> MemoryBank:
    return MemoryBank.open(made.bank)


@pytest.fixture(scope="module")
def table(made) -> NeighbourTable:
    return NeighbourTable.open(made.neighbours, verify="sha256")


def held(bank) -> list[int]:
    return bank.metadata.doc_ids.tolist()


def allowed(bank, doc, other, limit=0.999) -> bool:
    """What a list may hold, from the bank itself."""
    one, two = bank.metadata.rows(np.array([doc, other]))
    vectors = bank.embeddings.documents(np.array([one, two]))
    captions, clusters = bank.metadata.captions, bank.metadata.clusters
    return bool(captions[one] != captions[two] and clusters[one] != clusters[two] and vectors[0] @ vectors[1] < limit)


def test_lists_are_those_of_exact_search_without_copies(bank, table):
    documents = bank.embeddings.documents(np.arange(len(bank)))
    for row, doc in enumerate(held(bank)):
        ids, scores = table.candidates(doc, "image")
        assert ids.dtype == np.int64 and scores.dtype == np.float32 and len(ids) == table.keep == 8
        query = bank.embeddings.take("image", np.array([row]))[0]
        order = [held(bank)[r] for r in np.argsort(-(documents @ query), kind="stable")]
        expected, clusters = [], set()
        for other in order:
            cluster = int(bank.metadata.clusters[bank.metadata.rows(np.array([other]))[0]])
            if other != doc and allowed(bank, doc, other) and cluster not in clusters:
                expected.append(other)
                clusters.add(cluster)
        assert ids.tolist() == expected[:8], doc
        exact = documents[bank.metadata.rows(ids)] @ query
        assert (scores >= exact - 1e-6).all() and (scores - exact < 1e-3).all()


def test_no_document_is_its_own_neighbour_nor_its_copies(bank, table):
    keys = {row["key"]: row["doc_id"] for row in bank.describe(held(bank))}
    first, copy, same = keys["red-square"], keys["copy"], keys["same-caption"]
    clusters = table.metadata.clusters[table.metadata.rows(np.array([first, copy]))]
    assert clusters[0] == clusters[1]
    for doc in held(bank):
        for kind, variant in (("image", 0), ("text", 0), ("text", 1)):
            ids = table.candidates(doc, kind, variant)[0].tolist()
            assert doc not in ids and len(set(ids)) == len(ids)
            if doc == first:
                assert copy not in ids and same not in ids
            assert not {first, copy} <= set(ids)


def test_documents_outside_the_bank_have_no_candidates(table):
    for doc in (24, 25, 52, DOCUMENTS - 1):
        ids, scores = table.candidates(doc, "image")
        assert (ids == -1).all() and (scores == -np.inf).all()
        assert (table.candidates(doc, "text", 1)[0] == -1).all() and not any(table.alike(doc, 0))
    for doc in (-1, DOCUMENTS):
        with pytest.raises(DataError, match=r"expected 0..54"):
            table.candidates(doc, "image")
    for kind, variant in (("text", 2), ("text", -1), ("sound", 0)):
        with pytest.raises(DataError, match="has no list"):
            table.candidates(0, kind, variant)


def test_text_queries_have_dropped_tokens_and_differ_by_variant(made, bank, table):
    encoder = Encoder.load(made.encoder)
    doc, row = held(bank)[30], 30
    tokens = encoder.tokenize(bank.captions(row, row + 1))[0]
    for variant in (0, 1):
        query = encoder.encode_tokens([drop_tokens(tokens, 0.2, 0, doc, variant)])[0]
        ids, scores = table.candidates(doc, "text", variant)
        exact = bank.embeddings.documents(bank.metadata.rows(ids)) @ query
        np.testing.assert_allclose(scores, exact, atol=1e-3)
    lists = [[table.candidates(d, "text", v)[1].tolist() for d in held(bank)] for v in (0, 1)]
    assert sum(a != b for a, b in zip(*lists, strict=True)) > 10


def test_tokens_are_dropped_at_the_rate_asked_and_never_all():
    tokens = list(range(10))
    kept = [drop_tokens(tokens, 0.2, 0, doc, 0) for doc in range(2000)]
    assert abs(np.mean([len(row) for row in kept]) - 8) < 0.15
    assert all(row == sorted(row) and row for row in kept)
    assert drop_tokens(tokens, 0.2, 0, 5, 0) == kept[5] != drop_tokens(tokens, 0.2, 1, 5, 0)
    assert drop_tokens([4], 0.9, 0, 1, 0) == [4] and drop_tokens([], 0.5, 0, 1, 0) == []
    assert all(drop_tokens([1, 2], 0.99, 0, doc, 0) for doc in range(200))
    assert drop_tokens(tokens, 0.0, 0, 1, 0) == tokens


def test_alike_says_which_candidates_resemble_one_another(bank, table):
    for doc in held(bank)[::7]:
        ids = np.concatenate([table.candidates(doc, "image")[0], table.candidates(doc, "text", 1)[0]])
        rows = bank.metadata.rows(ids)
        vectors = bank.embeddings.documents(np.maximum(rows, 0))
        near = (vectors @ vectors.T > 0.9) & (rows >= 0)[:, None] & (rows >= 0)[None, :]
        bits = [[bool(mask >> j & 1) for j in range(16)] for mask in table.alike(doc, 1)]
        assert np.array_equal(bits, near)


def test_bits_fill_the_smallest_numbers():
    assert [alike_dtype(keep).itemsize for keep in (1, 4, 5, 8, 9, 16, 17, 32)] == [1, 1, 2, 2, 4, 4, 8, 8]
    similar = np.zeros((1, 64, 64), bool)
    similar[0, 3, [0, 63]] = True
    assert int(masks(similar, 32)[0, 3]) == 2**63 + 1


def test_half_precision_never_lowers_a_score():
    scores = np.float32([0.9, 0.90001, 0.8999, 0.5, -0.3333, 1.0, -np.inf])
    half = scores_up(scores).astype(np.float32)
    assert (half >= scores).all() and (half[:-1] - scores[:-1] < 1e-3).all()


def test_clusters_join_over_chains():
    clusters = np.array([0, 1, 2, 1, 4, 5, 6])
    joined = join_clusters(clusters, np.array([[4, 3], [6, 5], [5, 2], [0, 0]]))
    assert joined.tolist() == [0, 1, 2, 1, 1, 2, 2]
    assert join_clusters(clusters, np.zeros((0, 2), np.int64)).tolist() == clusters.tolist()
    chain = np.stack([np.arange(999), np.arange(1, 1000)], 1)[np.random.default_rng(0).permutation(999)]
    assert (join_clusters(np.arange(1000), chain) == 0).all()


def test_copies_by_vectors_share_a_cluster_and_make_room(made, bank, tmp_path):
    # Low enough a limit that many documents count as copies: the lists hold what is left, further down.
    options = made.neighbour_options(tmp_path / "n", duplicate=0.8, search=50)
    report = find_neighbours(options)
    table = NeighbourTable.open(tmp_path / "n")
    assert report.copies > 10
    vectors = bank.embeddings.documents(np.arange(len(bank)))
    for row, doc in enumerate(held(bank)):
        ids = table.candidates(doc, "image")[0]
        kept = bank.metadata.rows(ids[ids >= 0])
        assert (vectors[kept] @ vectors[row] < 0.8).all()
    near = np.argwhere(np.triu(vectors @ vectors.T >= 0.8, 1))
    found = np.concatenate([np.load(path) for path in sorted((tmp_path / "n" / "copies").iterdir())])
    assert {tuple(sorted(pair)) for pair in bank.metadata.rows(found).tolist()} <= {
        tuple(pair) for pair in near.tolist()
    }
    clusters = table.metadata.clusters
    assert all(clusters[a] == clusters[b] for a, b in bank.metadata.rows(found).tolist())


def test_blocks_change_nothing_but_the_files(made, table, tmp_path):
    find_neighbours(made.neighbour_options(tmp_path / "n", block=7))
    other = NeighbourTable.open(tmp_path / "n")
    for doc in range(DOCUMENTS):
        for kind, variant in (("image", 0), ("text", 0), ("text", 1)):
            one, two = table.candidates(doc, kind, variant), other.candidates(doc, kind, variant)
            # The scores of text queries may differ in the last bit, which batches decide.
            np.testing.assert_allclose(one[1], two[1], atol=1e-3)
            assert len(set(one[0].tolist()) ^ set(two[0].tolist())) <= 2


def test_interrupted_work_goes_on_to_the_same_bytes(made, bank, tmp_path):
    options = made.neighbour_options(tmp_path / "n")
    blocks = plan(options, *[read_manifest(made.bank, "bank")] * 2)
    names = ("keep", "search", "text_variants", "query_dropout", "alike", "duplicate", "batch", "seed")
    settings = {name: getattr(options, name) for name in names} | {"block": 20}
    inputs = {"bank": bank.fingerprint} | bank.inputs
    job = Job(tmp_path / "n", "neighbours", settings, inputs)
    job.prepare()
    run_unit(blocks, job.work, 2)
    kept = (job.folder / "image" / "part-00002.ids.npy").stat().st_mtime_ns
    find_neighbours(options)
    assert (tmp_path / "n" / "image" / "part-00002.ids.npy").stat().st_mtime_ns == kept
    assert same_bytes(tmp_path / "n", made.neighbours)


@pytest.mark.long
def test_several_workers_give_the_same_bytes(made, tmp_path):
    find_neighbours(made.neighbour_options(tmp_path / "n", workers=3))
    assert same_bytes(tmp_path / "n", made.neighbours)


def test_nothing_is_done_twice_and_other_settings_are_refused(made):
    options = made.neighbour_options(made.neighbours)
    report = find_neighbours(options)
    assert report.seconds == 0 and (report.documents, report.with_image, report.with_text) == (DOCUMENTS, 50, 50)
    with pytest.raises(DataError, match=r"query_dropout = 0.2 then, 0.5 now"):
        find_neighbours(replace(options, query_dropout=0.5))


def test_a_table_moves_and_can_be_pickled(made, table, copy, tmp_path):
    moved = NeighbourTable.open(shutil.move(copy(made.neighbours), tmp_path / "elsewhere" / "n"))
    table.candidates(3, "image")
    sent = pickle.loads(pickle.dumps(table))
    for other in (moved, sent):
        assert all(
            np.array_equal(a, b)
            for a, b in zip(other.candidates(3, "text", 1), table.candidates(3, "text", 1), strict=True)
        )
        assert other.alike(3, 1) == table.alike(3, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"keep": 0},
        {"keep": 33, "search": 64},
        {"search": 4},
        {"text_variants": 0},
        {"query_dropout": 1.0},
        {"block": -1},
    ],
)
def test_impossible_settings_are_refused(made, tmp_path, changes):
    with pytest.raises(ConfigError):
        find_neighbours(made.neighbour_options(tmp_path / "n", **changes))


def test_a_damaged_bank_or_another_encoder_is_refused(made, copy, tmp_path):
    make_encoder(EncoderOptions((made.inputs,), str(tmp_path / "other"), replace(TINY, steps=1)))
    with pytest.raises(DataError, match="another encoder"):
        find_neighbours(made.neighbour_options(tmp_path / "n", encoder=str(tmp_path / "other")))
    folder = copy(made.bank)
    flip(folder / "emb" / "image" / "part-00001.npy")
    with pytest.raises(DataError, match="damaged"):
        find_neighbours(made.neighbour_options(tmp_path / "n", bank=str(folder)))


def test_verification_recomputes_and_finds_what_was_changed(made, copy, tmp_path):
    whole = verify_neighbours(made.neighbours, share=1.0)
    assert (whole.documents, whole.lists, whole.recomputed) == (DOCUMENTS, 3, DOCUMENTS)
    assert verify_neighbours(made.neighbours, share=0.01).recomputed in (15, 20)
    assert verify_neighbours(copy(made.neighbours)).recomputed == 0
    folder = tmp_path / made.neighbours.name
    assert verify_neighbours(folder, bank=made.bank, share=1).recomputed == DOCUMENTS
    path = folder / "text-0" / "part-00001.scores.npy"
    flip(path)
    with pytest.raises(DataError, match="damaged"):
        verify_neighbours(folder)


def remake(folder) -> None:
    """The manifest anew, as if the folder had been made so."""
    manifest = read_manifest(folder, "neighbours", verify="none")
    (folder / "manifest.json").unlink()
    write_manifest(folder, "neighbours", manifest.settings, manifest.inputs)


def test_lists_that_were_made_wrongly_are_found(made, copy):
    folder = copy(made.neighbours)
    path = folder / "image" / "part-00000.ids.npy"
    right = np.load(path)
    for column, value, message in ((0, 3, "its own neighbour"), (2, 24, "not in the bank"), (1, -1, "no candidate")):
        wrong = right.copy()
        wrong[3, column] = value
        np.save(path, wrong)
        remake(folder)
        with pytest.raises(DataError, match=message):
            verify_neighbours(folder)
    # A plausible but false entry is found by computing again.
    wrong = right.copy()
    wrong[3, :2] = right[3, 1::-1]
    np.save(path, wrong)
    remake(folder)
    assert verify_neighbours(folder).recomputed == 0
    with pytest.raises(DataError, match="differs from what the same bank"):
        verify_neighbours(folder, bank=made.bank, share=1)


def test_another_bank_is_refused(made, tmp_path):
    from megacm3.retrieval.build_bank import build_bank

    build_bank(made.bank_options(tmp_path / "bank", shard_rows=50))
    assert verify_bank(tmp_path / "bank").found_first == 1
    with pytest.raises(DataError, match="was made with bank"):
        verify_neighbours(made.neighbours, bank=tmp_path / "bank")


def test_numbers_of_a_huge_bank_fit_though_few_documents_ask(made, copy, tmp_path):
    huge = copy(made.bank)
    manifest = read_manifest(huge, "bank")
    (huge / "manifest.json").unlink()
    write_manifest(huge, "bank", manifest.settings | {"documents": 2**31 + 100}, manifest.inputs)
    options = made.neighbour_options(tmp_path / "n", bank=str(huge), queries=str(made.bank))
    blocks = plan(options, read_manifest(huge, "bank"), read_manifest(made.bank, "bank"))
    paths = blocks.make(tmp_path / "folder", 0)
    found = [np.load(path) for path in paths if path.name.endswith(".ids.npy")]
    assert found and all(array.dtype == np.int64 for array in found)
