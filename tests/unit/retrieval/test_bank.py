"""The bank: joined by document number, the same bytes however it is made, and damage or a mismatch never unseen."""

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest

from megacm3.data.sources import find_shards, read_shard
from megacm3.data.store import Store
from megacm3.data.units import UnitSettings, prepare
from megacm3.errors import ConfigError, DataError
from megacm3.files import read_manifest, write_manifest
from megacm3.retrieval.bank import Embeddings, MemoryBank, caption_hash
from megacm3.retrieval.build_bank import build_bank
from megacm3.retrieval.embed import EmbedParts, read_documents
from megacm3.retrieval.encoder import Encoder, document_vectors
from megacm3.retrieval.index import new_index
from megacm3.retrieval.jobs import Job
from megacm3.retrieval.shards import write_shard
from megacm3.retrieval.train_encoder import EncoderOptions, make_encoder
from megacm3.retrieval.units import run_unit
from megacm3.retrieval.verify import verify_bank
from tests.unit.data.makers import pairs, picture, write_tar
from tests.unit.retrieval.conftest import flip, same_bytes
from tests.unit.retrieval.makers import DIM, DOCUMENTS, PARTS, TINY, make_store, members


@pytest.fixture(scope="module")
def bank(made) -> MemoryBank:
    return MemoryBank.open(made.bank, verify="sha256")


def again(folder) -> None:
    """Write the manifest of a folder anew, as if it had been made so."""
    manifest = read_manifest(folder, "bank", verify="none")
    (folder / "manifest.json").unlink()
    write_manifest(folder, "bank", manifest.settings, manifest.inputs)


def test_it_holds_the_documents_with_picture_and_caption_in_several_shards(made, bank):
    store = Store.open(made.store)
    assert (len(store), bank.documents, len(bank)) == (DOCUMENTS, DOCUMENTS, 50)
    assert tuple(bank.settings["parts"]) == PARTS and bank.settings["shards"] == 3
    assert bank.metadata.doc_ids.tolist() == [*range(24), *range(26, 52)]
    assert bank.inputs["store"] == store.fingerprint
    assert bank.metadata.rows(np.array([0, 23, 24, 26, 54, -1])).tolist() == [0, 23, -1, 24, -1, -1]


def test_every_vector_is_that_of_its_own_document(made, bank):
    encoder = Encoder.load(made.encoder)
    by_key = dict(zip([name.split(".")[0] for name, _ in members()[::2]], members()[1::2], strict=True))
    captions = Store.open(made.store).metadata(["key", "caption"]).to_pylist()
    rows = bank.metadata.rows(np.arange(DOCUMENTS))
    held = np.flatnonzero(rows >= 0)
    texts = encoder.encode_texts([captions[doc]["caption"] for doc in held])
    np.testing.assert_allclose(bank.embeddings.take("text", rows[held]), texts, atol=1e-3)
    for doc in held:
        described = bank.describe([doc])[0]
        assert described["doc_id"] == doc and described["key"] == captions[doc]["key"]
        assert described["caption"].encode() == by_key[described["key"]][1]


def test_a_document_is_found_by_its_vectors(bank):
    rows = np.arange(len(bank))
    vectors = bank.embeddings.documents(rows)
    scores, ids = bank.search(vectors, 3)
    assert (ids[:, 0] == bank.metadata.doc_ids).all()
    np.testing.assert_allclose(scores[:, 0], 1, atol=2e-3)
    halves = document_vectors(bank.embeddings.take("image", rows), bank.embeddings.take("text", rows))
    np.testing.assert_array_equal(vectors, halves)


def test_rows_are_taken_in_the_order_asked_across_parts(bank):
    rows = np.array([30, 2, 49, 2, 23, 24])
    one_by_one = np.concatenate([bank.embeddings.take("image", np.array([row])) for row in rows])
    np.testing.assert_array_equal(bank.embeddings.take("image", rows), one_by_one)
    assert bank.captions(22, 26) == [row["caption"] for row in bank.describe(bank.metadata.doc_ids[22:26])]
    assert bank.embeddings.take("text", np.zeros(0, np.int64)).shape[0] == 0


def test_searching(bank):
    query = bank.embeddings.documents(np.arange(2))
    best = bank.search(query, 1)[1][:, 0]
    assert not np.isin(bank.search(query, 50, exclude=best)[1], best).any()
    scores, ids = bank.search(query, 60)
    assert ids.shape == scores.shape == (2, 60) and (ids[:, 50:] == -1).all() and (scores[:, 50:] == -np.inf).all()
    assert sorted(ids[0, :50].tolist()) == bank.metadata.doc_ids.tolist()
    assert bank.search(query[:0], 5)[1].shape == (0, 5)


def test_queries_that_cannot_be_answered_are_refused(bank):
    with pytest.raises(DataError, match=r"shape \(2, 63\).*width 64"):
        bank.search(np.zeros((2, 63), np.float32), 3)
    with pytest.raises(DataError, match="width 64"):
        bank.search(np.zeros(DIM, np.float32), 3)
    broken = np.ones((3, DIM), np.float32)
    broken[1, 5] = np.nan
    with pytest.raises(DataError, match="1 of 3 queries"):
        bank.search(broken, 3)
    with pytest.raises(ConfigError, match="k = 0"):
        bank.search(broken[:1], 0)
    with pytest.raises(DataError, match="document 24 is not in"):
        bank.describe([24])


def test_captions_are_compared_without_case_and_white_space():
    assert caption_hash("A red  square\non white ") == caption_hash("a Red square on WHITE")
    assert caption_hash("a red square") != caption_hash("a red squares")


def test_a_moved_bank_works_and_can_be_pickled(made, bank, copy, tmp_path):
    moved = MemoryBank.open(shutil.move(copy(made.bank), tmp_path / "elsewhere" / "bank"), verify="sha256")
    query = bank.embeddings.documents(np.arange(5))
    assert np.array_equal(moved.search(query, 5)[1], bank.search(query, 5)[1])
    assert moved.fingerprint == bank.fingerprint and moved.encoder().fingerprint == bank.inputs["encoder"]
    metadata = pickle.loads(pickle.dumps(moved.metadata))
    assert np.array_equal(metadata.doc_ids, bank.metadata.doc_ids)
    embeddings: Embeddings = pickle.loads(pickle.dumps(moved.embeddings))
    assert np.array_equal(embeddings.documents(np.arange(5)), query)


def test_interrupted_work_goes_on_to_the_same_bytes(made, tmp_path):
    options = made.bank_options(tmp_path / "bank")
    inputs = {"store": Store.open(made.store).fingerprint, "encoder": Encoder.load(made.encoder).fingerprint}
    names = ("index", "backend", "server", "shard_rows", "nprobe", "merge", "batch", "seed")
    job = Job(tmp_path / "bank", "bank", {name: getattr(options, name) for name in names}, inputs)
    job.prepare()
    run_unit(EmbedParts(options.store, options.encoder, "", options.inputs, 3), job.work, 1)
    kept = (job.folder / "emb" / "text" / "part-00001.npy").stat().st_mtime_ns
    assert build_bank(options).seconds > 0
    assert (tmp_path / "bank" / "emb" / "text" / "part-00001.npy").stat().st_mtime_ns == kept
    assert same_bytes(tmp_path / "bank", made.bank)
    assert not job.work.exists()


def test_nothing_is_done_twice_and_other_settings_are_refused(made):
    options = made.bank_options(made.bank)
    report = build_bank(options)
    assert report.seconds == 0 and (report.rows, report.documents, report.shards) == (50, DOCUMENTS, 3)
    with pytest.raises(DataError, match=r"shard_rows = 20 then, 30 now"):
        build_bank(replace(options, shard_rows=30))


@pytest.mark.long
def test_several_workers_give_the_same_bytes(made, tmp_path):
    build_bank(made.bank_options(tmp_path / "bank", workers=3))
    assert same_bytes(tmp_path / "bank", made.bank)


def test_an_inverted_file_is_measured_and_merges(made, tmp_path, bank):
    shards = made.bank_options(tmp_path / "shards", index="IVF2,SQ8", nprobe=2)
    report = build_bank(shards)
    assert min(report.recall.values()) > 0.95
    measured = json.loads((tmp_path / "shards" / "eval" / "recall.json").read_text())
    assert measured["nprobe"] == 2 and measured["queries"] == 50
    build_bank(replace(shards, output=str(tmp_path / "merged"), merge=True))
    files = sorted(path.name for path in (tmp_path / "merged" / "index").iterdir())
    assert files == ["merged.faiss", "merged.ivfdata", "trained.faiss"]
    query = bank.embeddings.documents(np.arange(10))
    found = [MemoryBank.open(tmp_path / name).search(query, 5)[1] for name in ("shards", "merged")]
    assert np.array_equal(*found)
    assert verify_bank(shutil.move(tmp_path / "merged", tmp_path / "moved")).found_first > 0.95


def test_the_fewest_lists_that_reach_the_recall_are_searched(made, tmp_path, caplog):
    build_bank(made.bank_options(tmp_path / "bank", index="IVF16,Flat"))
    settings = read_manifest(tmp_path / "bank", "bank").settings
    # A sixteenth of 16 lists is one: too few here, which is said.
    assert settings["nprobe"] == 1 and "recall@10" in caplog.text


def test_any_flipped_byte_is_found(made, copy):
    folder = copy(made.bank)
    names = sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"
    )
    assert len(names) >= 15
    for name in names:
        flip(folder / name)
        with pytest.raises(DataError, match=f"{name} is damaged"):
            MemoryBank.open(folder, verify="sha256")
        flip(folder / name)
    flip(folder / "manifest.json", 400)
    with pytest.raises(DataError, match=r"manifest\.json"):
        MemoryBank.open(folder)


def test_missing_and_empty_shards_are_found(made, copy):
    folder = copy(made.bank)
    shard = folder / "index" / "shard-00001-of-00003.faiss"
    data = shard.read_bytes()
    shard.write_bytes(b"")
    with pytest.raises(DataError, match="has 0 bytes"):
        MemoryBank.open(folder)
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00001-of-00003.faiss is missing"):
        MemoryBank.open(folder)
    shard.write_bytes(data)
    MemoryBank.open(folder)


def test_counts_that_differ_are_found(made, copy, bank):
    folder = copy(made.bank)
    shard = folder / "index" / "shard-00001-of-00003.faiss"
    write_shard(shard, new_index("Flat", DIM), [(np.arange(4), bank.embeddings.documents(np.arange(4)))])
    again(folder)
    with pytest.raises(DataError, match=r"index holds 34 vectors.*manifest says 50"):
        MemoryBank.open(folder)


def test_an_index_of_other_documents_is_found(made, copy, bank):
    folder = copy(made.bank)
    vectors = bank.embeddings.documents(np.arange(20, 40))
    write_shard(
        folder / "index" / "shard-00001-of-00003.faiss", new_index("Flat", DIM), [(np.arange(20) + 900, vectors)]
    )
    again(folder)
    with pytest.raises(DataError, match=r"gave document 9.*the store has 55"):
        MemoryBank.open(folder).search(vectors, 1)
    with pytest.raises(DataError, match="other document numbers"):
        verify_bank(folder)


def test_parts_of_another_shape_are_found(made, copy):
    folder = copy(made.bank)
    np.save(folder / "emb" / "image" / "part-00000.npy", np.zeros((23, DIM), np.float16))
    again(folder)
    with pytest.raises(DataError, match=r"shape \(23, 64\)"):
        MemoryBank.open(folder).embeddings.documents(np.array([0]))
    np.save(folder / "emb" / "image" / "part-00000.npy", np.full((24, DIM), 0.5, np.float16))
    again(folder)
    with pytest.raises(DataError, match="not of length 1"):
        verify_bank(folder)


def test_folders_that_are_no_bank_are_refused(made, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        MemoryBank.open(tmp_path / "nothing")
    with pytest.raises(DataError, match="of kind 'store'; expected 'bank'"):
        MemoryBank.open(made.store)
    with pytest.raises(DataError, match="does not exist"):
        build_bank(made.bank_options(tmp_path / "b", store=str(tmp_path / "nothing")))
    with pytest.raises(DataError, match="does not exist"):
        build_bank(made.bank_options(tmp_path / "b", encoder=str(tmp_path / "nothing")))


def test_another_encoder_is_refused(made, bank, tmp_path):
    make_encoder(EncoderOptions((made.inputs,), str(tmp_path / "other"), replace(TINY, steps=1)))
    with pytest.raises(DataError, match="another encoder"):
        bank.check_encoder(Encoder.load(tmp_path / "other"))
    bank.check_encoder(Encoder.load(made.encoder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard_rows": -1}, "--shard-size"),
        ({"inputs": ()}, "--input is needed"),
        ({"index": "HNSW32"}, "--index HNSW32"),
        ({"index": "IVF500,Flat"}, "cannot be trained on 50 vectors"),
        ({"merge": True}, "--merge needs an inverted file"),
    ],
)
def test_impossible_settings_are_refused(made, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_bank(made.bank_options(tmp_path / "bank", **changes))
    assert not (tmp_path / "bank").exists()


def test_input_that_the_store_was_not_made_from_is_refused(made, tmp_path):
    whole = members()
    folder = tmp_path / "input"
    write_tar(folder / "part-2.tar", whole[48:])
    with pytest.raises(DataError, match=r"no shard part-0\.tar.*has part-2\.tar"):
        build_bank(made.bank_options(tmp_path / "bank", inputs=(str(folder / "part-*"),)))
    write_tar(folder / "part-0.tar", whole[:40])
    with pytest.raises(DataError, match="20 of the 24 documents"):
        build_bank(made.bank_options(tmp_path / "bank", inputs=(str(folder / "part-*"),)))
    write_tar(folder / "part-0.tar", [*whole[:2], (whole[2][0], whole[0][1]), *whole[3:48]])
    with pytest.raises(DataError, match=r"picture of part-0.tar, key red-bar, is not the one"):
        build_bank(made.bank_options(tmp_path / "bank", inputs=(str(folder / "part-*"),)))
    write_tar(folder / "part-0.tar", [*whole[:3], (whole[3][0], b"another caption"), *whole[4:48]])
    with pytest.raises(DataError, match=r"caption of part-0.tar, key red-bar, is not the one"):
        build_bank(made.bank_options(tmp_path / "bank", inputs=(str(folder / "part-*"),)))
    assert not (tmp_path / "bank").exists()


def test_every_part_of_a_data_set_is_found_again(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = {
        "image": [{"bytes": picture(n), "path": None} for n in range(5)],
        "text": [f"number {n}" for n in range(5)],
    }
    datasets.Dataset.from_dict(table, features=features).save_to_disk(tmp_path / "set")
    for shard in find_shards(str(tmp_path / "set"), rows_per_unit=3):
        rows = []
        for sample in read_shard(shard):
            ready = prepare(sample, 16, UnitSettings())
            rows.append(ready.meta)
        found = read_documents((str(tmp_path / "set"),), rows)
        assert sorted(place for place, _ in found) == list(range(len(rows)))
        assert len(rows) == (3 if shard.rows == (0, 3) else 2)


def test_a_store_without_pairs_gives_no_bank(made, tmp_path):
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    make_store(tmp_path / "store", str(tmp_path / "texts.txt"))
    with pytest.raises(DataError, match="no document with a picture and a caption"):
        build_bank(made.bank_options(tmp_path / "bank", store=str(tmp_path / "store")))


def test_a_bank_of_one_document(made, tmp_path):
    pattern = str(write_tar(tmp_path / "one.tar", pairs(0, 1)))
    make_store(tmp_path / "store", pattern)
    build_bank(made.bank_options(tmp_path / "bank", store=str(tmp_path / "store"), inputs=(pattern,)))
    bank = MemoryBank.open(tmp_path / "bank")
    assert bank.search(bank.embeddings.documents(np.array([0])), 3)[1].tolist() == [[0, -1, -1]]
