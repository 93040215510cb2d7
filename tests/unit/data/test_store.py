"""The store: megatron's format, exact contents, and every kind of damage found."""

import pickle
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pyarrow.parquet as pq
import pytest

from megacm3.data.documents import ANSWER, IMAGE, TEXT
from megacm3.data.parts import META_FIELDS, PartWriter, _dup_clusters, write_store
from megacm3.data.store import Part, Store, StoreShape, verify_store
from megacm3.errors import DataError
from megacm3.files import read_manifest, write_manifest
from tests.helpers.stores import make_store

SHAPE = StoreShape(text_size=1000, codebook_size=512, image_tokens=9, image_size=24)


def documents(count, shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for n in range(count):
        segments = [(TEXT, rng.integers(0, shape.text_size, rng.integers(1, 9)))]
        if n % 5 != 4:
            segments.append((IMAGE, rng.integers(0, shape.codebook_size, shape.image_tokens)))
        if n % 7 == 6:
            segments.insert(0, segments.pop())
        meta = {
            "key": f"k{n}",
            "shard": "s",
            "row": n,
            "caption": f"c{n}",
            "caption_sha1": str(n),
            "images": len(segments) - 1,
        }
        if n % 5 != 4:
            meta |= {"image_sha256": f"h{n // 2}", "phash": 2**63 + n, "width": 10, "height": 20}
        made.append((segments, meta))
    return made


@pytest.fixture(scope="module")
def made():
    return documents(40)


@pytest.fixture(scope="module")
def original(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "store"
    write_store(folder, made, SHAPE, {"text_tokenizer": "t", "image_tokenizer": "i"}, documents_per_part=15)
    return folder


@pytest.fixture
def copy(original, tmp_path):
    shutil.copytree(original, tmp_path / "store")
    return tmp_path / "store"


def test_documents_come_back(original, made):
    store = Store.open(original)
    assert len(store) == 40 and store.settings["documents"] == 40 and len(store.settings["parts"]) == 3
    for doc_id in (*range(40), 39, 0, 20):
        document = store.document(doc_id)
        assert document.doc_id == doc_id
        assert [(s.kind, s.tokens.tolist()) for s in document.segments] == [(k, t.tolist()) for k, t in made[doc_id][0]]
        assert document.segments[0].tokens.dtype == np.int64
        assert store.segment_lengths(doc_id) == [(kind, len(tokens)) for kind, tokens in made[doc_id][0]]
    for outside in (-1, 40):
        with pytest.raises(DataError, match=r"expected 0\.\.39"):
            store.document(outside)


def test_megatron_reads_the_same(original, made):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(str(original / "tokens" / "part-00000"), multimodal=True)
    assert len(data.document_indices) == 16 and data.index.dtype == np.uint16
    sequences = [segment for segments, _ in made[:15] for segment in segments]
    assert len(data) == len(sequences)
    for i, (kind, tokens) in enumerate(sequences):
        found, mode = data[i]
        assert mode == kind and found.tolist() == tokens.tolist()


def test_arrays_outlive_the_store(original):
    # megatron's own views crash the process here.
    code = (
        "import sys; from megacm3.data.store import Store; s = Store.open(sys.argv[1]); "
        "t = s.document(0).segments[0].tokens; del s; import gc; gc.collect(); t += 1; print(t.sum())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(original)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_reading_needs_neither_torch_nor_megatron(original):
    code = (
        "import sys; from megacm3.data.store import Store; s = Store.open(sys.argv[1]); s.document(3); s.metadata(); "
        "assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(original)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_metadata_in_order_with_clusters(original, made):
    table = Store.open(original).metadata()
    assert table.column_names == ["doc_id", "dup_cluster", *META_FIELDS]
    assert table["doc_id"].to_pylist() == list(range(40))
    assert table["key"].to_pylist() == [meta["key"] for _, meta in made]
    clusters = table["dup_cluster"].to_pylist()
    # Documents 2k and 2k+1 share a picture, except where one of them has none.
    assert clusters[:6] == [0, 0, 2, 2, 4, 5]
    assert Store.open(original).metadata(["doc_id", "dup_cluster"]).num_columns == 2
    with pytest.raises(DataError, match="no column colour"):
        Store.open(original).metadata(["colour"])


def test_clusters_join_over_chains(tmp_path):
    text = [(TEXT, np.array([1]))]
    rows = [("a", 1), ("b", 2), ("b", 1), ("c", 3), (None, None), (None, None)]
    docs = [
        (text, {"key": str(i), "caption_sha1": "same", "image_sha256": e, "phash": h}) for i, (e, h) in enumerate(rows)
    ]
    store = write_store(tmp_path / "s", docs, SHAPE)
    assert store.metadata(["dup_cluster"])["dup_cluster"].to_pylist() == [0, 0, 0, 3, 4, 4]


def test_pickle_and_vocabulary(original):
    store = Store.open(original)
    store.document(0)
    again = pickle.loads(pickle.dumps(store))
    assert again.document(39).segments[0].tokens.tolist() == store.document(39).segments[0].tokens.tolist()
    vocabulary = store.vocabulary()
    assert (vocabulary.text_size, vocabulary.codebook_size, vocabulary.image_tokens) == (1000, 512, 9)
    assert store.inputs == {"text_tokenizer": "t", "image_tokenizer": "i"}


@pytest.mark.parametrize(("text_size", "dtype"), [(65536, np.uint16), (56320, np.uint16), (65537, np.int32)])
def test_type_follows_the_size(tmp_path, text_size, dtype):
    shape = StoreShape(text_size, 8192, 4, 16)
    top = np.array([0, text_size - 1])
    store = write_store(tmp_path / "s", [([(TEXT, top)], {"key": "k"})], shape)
    assert shape.dtype == dtype and store.settings["dtype"] == np.dtype(dtype).name
    assert store.document(0).segments[0].tokens.tolist() == top.tolist()


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ((TEXT, np.array([1000])), r"text ids 1000\.\.1000 outside 0\.\.999"),
        ((TEXT, np.array([-1, 5])), r"text ids -1\.\.5"),
        ((TEXT, np.array([70000])), "outside"),
        ((IMAGE, np.full(9, 512)), r"outside 0\.\.511"),
        ((IMAGE, np.zeros(8, int)), "8 codes; expected exactly 9"),
        ((TEXT, np.array([], int)), "is empty"),
        ((4, np.array([1])), "mode 4"),
    ],
)
def test_nothing_out_of_range_is_written(tmp_path, segment, message):
    with pytest.raises(DataError, match=message):
        write_store(tmp_path / "s", [([segment], {"key": "k"})], SHAPE)
    assert list(tmp_path.iterdir()) == []


def test_empty_store_is_refused(tmp_path):
    with pytest.raises(DataError, match="no document"):
        write_store(tmp_path / "s", [], SHAPE)


def test_verify_counts(original):
    report = verify_store(original)
    assert (report.documents, report.image_segments, report.rejects) == (40, 32, 0)
    assert report.tokens == Store.open(original).settings["tokens"]


@pytest.mark.parametrize(
    "name", ["tokens/part-00001.bin", "tokens/part-00001.idx", "meta/part-00002.parquet", "dup_cluster.npy"]
)
def test_verify_finds_one_flipped_bit(copy, name):
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    Store.open(copy)
    with pytest.raises(DataError, match=f"{path.name} is damaged"):
        verify_store(copy)


def test_open_finds_a_truncated_or_missing_file(copy):
    path = copy / "tokens" / "part-00001.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=rf"part-00001\.bin has {len(whole) - 2} bytes"):
        Store.open(copy)
    with pytest.raises(DataError, match="its index ends at"):
        Part(path.with_suffix(""))
    path.unlink()
    with pytest.raises(DataError, match="is missing"):
        Store.open(copy)


def test_truncated_index(copy):
    path = copy / "tokens" / "part-00000.idx"
    data = path.read_bytes()
    for size in (0, 20, 100, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match="part-00000"):
            Part(path.with_suffix(""))


def remanifest(folder, **settings):
    """Give the folder a manifest that fits its files, whatever they hold."""
    manifest = read_manifest(folder, "store", verify="none")
    write_manifest(folder, "store", manifest.settings | settings, manifest.inputs)


def test_verify_looks_at_the_ids_themselves(copy):
    path = copy / "tokens" / "part-00001.bin"
    data = np.fromfile(path, np.uint16)
    data[0] = 60000
    data.tofile(path)
    remanifest(copy)
    with pytest.raises(DataError, match=r"part-00001: document 0: \w+ ids .*60000 outside"):
        verify_store(copy)


def test_verify_finds_a_picture_without_its_grid(copy):
    remanifest(copy, image_tokens=16)
    with pytest.raises(DataError, match="9 codes; expected exactly 16"):
        verify_store(copy)


def test_verify_finds_wrong_counts(copy):
    parts = Store.open(copy).settings["parts"]
    remanifest(copy, parts=[parts[0] | {"documents": 14}, *parts[1:]])
    with pytest.raises(DataError, match="15 rows for 14 documents"):
        verify_store(copy)


def test_changed_manifest_and_other_kind(copy):
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"codebook_size": 512', '"codebook_size": 513'))
    with pytest.raises(DataError, match="changed by hand"):
        Store.open(copy)
    with pytest.raises(DataError, match="does not exist"):
        Store.open(copy / "nothing")


def test_many_parts_stay_within_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr("megacm3.data.store._OPEN_PARTS", 2)
    store = write_store(tmp_path / "s", documents(12), SHAPE, documents_per_part=2)
    for doc_id in (0, 5, 11, 3, 0):
        store.document(doc_id)
    assert len(store._parts) <= 2


def test_answers_are_kept_with_their_segments(tmp_path):
    question, answer, codes = np.array([1, 2]), np.array([3]), np.arange(9)
    both = [(TEXT, question), (TEXT | ANSWER, answer), (IMAGE, codes)], {"key": "text"}
    drawn = [(TEXT, question), (IMAGE | ANSWER, codes)], {"key": "picture"}
    store = write_store(tmp_path / "store", [both, drawn], SHAPE)
    found = [[(s.kind, s.tokens.tolist(), s.answer) for s in store.document(i).segments] for i in range(2)]
    assert found[0] == [(TEXT, [1, 2], False), (TEXT, [3], True), (IMAGE, codes.tolist(), False)]
    assert found[1] == [(TEXT, [1, 2], False), (IMAGE, codes.tolist(), True)]
    assert store.segment_lengths(0) == list(store.document(0).shape) == [(0, 2), (ANSWER, 1), (1, 9)]
    report = verify_store(tmp_path / "store")
    assert (report.text_segments, report.image_segments) == (3, 2)
    short = [(IMAGE | ANSWER, codes[:8])], {"key": "short"}
    with pytest.raises(DataError, match="exactly 9"):
        write_store(tmp_path / "short", [short], SHAPE)


def test_rows_of_metadata_go_to_disk_as_they_come(tmp_path):
    writer = PartWriter(tmp_path, SHAPE)
    for n in range(66_000):
        writer.add([(TEXT, np.ones(1, np.int64))], {"key": str(n)})
    assert (tmp_path / "meta.parquet").stat().st_size > 100_000
    assert writer.finish()["documents"] == 66_000
    assert pq.read_table(tmp_path / "meta.parquet")["key"].to_pylist() == [str(n) for n in range(66_000)]


def test_clusters_are_found_part_by_part(tmp_path):
    rng = np.random.default_rng(0)

    def pages():
        for n in range(10_000):
            twin = n if rng.random() < 0.7 else int(rng.integers(0, n + 1))
            meta = {"key": str(n), "caption_sha1": f"{twin:040d}", "image_sha256": f"{twin:064d}", "phash": twin}
            yield [(TEXT, np.ones(1, np.int64))], meta

    rows = list(pages())
    tracemalloc.start()
    write_store(tmp_path / "store", iter(rows), SHAPE, documents_per_part=500)
    tracemalloc.reset_peak()
    held = tracemalloc.get_traced_memory()[0]
    clusters = _dup_clusters(tmp_path / "store", 20)
    peak = tracemalloc.get_traced_memory()[1] - held
    tracemalloc.stop()
    expected: dict[str, int] = {}
    first = [expected.setdefault(meta["image_sha256"], n) for n, (_, meta) in enumerate(rows)]
    assert clusters.tolist() == first
    assert peak < 10_000 * 160


def test_a_store_of_an_earlier_version_lacks_a_column(tmp_path):
    folder = make_store(tmp_path / "store", documents=2, text_size=64, codebook_size=16, image_tokens=4)
    part = folder / "meta" / "part-00000.parquet"
    pq.write_table(pq.read_table(part).drop_columns(["task"]), part)
    with pytest.raises(DataError, match=r"has no task in its metadata.*make it again"):
        Store.open(folder, verify="none").metadata(["key", "task"])
