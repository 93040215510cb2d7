"""Vectors made elsewhere: joined by key whatever their order, and never to the wrong document."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megacm3.errors import ConfigError, DataError
from megacm3.retrieval.bank import MemoryBank
from megacm3.retrieval.build_bank import build_bank
from megacm3.retrieval.embed import EmbedParts
from megacm3.retrieval.encoder import Encoder
from megacm3.retrieval.find_neighbours import find_neighbours
from megacm3.retrieval.neighbours import NeighbourTable
from megacm3.retrieval.options import NeighbourOptions


def write_vectors(folder, rows, image, text, files=2):
    """clip-retrieval's layout; file 10 comes after file 2 only by number."""
    numbers = [2, 10, 11][:files]
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for number, part in zip(numbers, np.array_split(np.arange(len(rows)), files), strict=True):
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", image[part])
        np.save(folder / "text_emb" / f"text_emb_{number}.npy", text[part])
        table = pa.Table.from_pylist([rows[n] for n in part])
        pq.write_table(table, folder / "metadata" / f"metadata_{number}.parquet")
    return folder


@pytest.fixture
def source(made):
    """Rows, image and text vectors of the bank's documents, in another order, not of unit length."""
    bank = MemoryBank.open(made.bank)
    order = np.random.default_rng(0).permutation(len(bank))
    described = bank.describe(bank.metadata.doc_ids[order])
    rows = [{"key": row["key"], "caption": row["caption"], "other": 1} for row in described]
    return rows, 3 * bank.embeddings.take("image", order), bank.embeddings.take("text", order)


def build(made, folder, output):
    return build_bank(made.bank_options(output, encoder=f"precomputed:{folder}", inputs=()))


def test_they_are_joined_by_key(made, source, tmp_path):
    folder = write_vectors(tmp_path / "vectors", *source)
    build(made, folder, tmp_path / "bank")
    bank, expected = MemoryBank.open(tmp_path / "bank"), MemoryBank.open(made.bank)
    rows = np.arange(len(expected))
    np.testing.assert_allclose(bank.embeddings.documents(rows), expected.embeddings.documents(rows), atol=1e-3)
    assert bank.metadata.doc_ids.tolist() == expected.metadata.doc_ids.tolist()
    assert build(made, folder, tmp_path / "bank").seconds == 0
    with pytest.raises(ConfigError, match="--encoder DIR"):
        bank.encoder()
    bank.check_encoder(Encoder.load(made.encoder))


def test_a_unit_does_not_read_every_file(made, source, tmp_path):
    folder = write_vectors(tmp_path / "vectors", *source)
    far = [{"key": f"far-{n}"} for n in range(100_000)]
    vectors = np.zeros((len(far), source[1].shape[1]), np.float32)
    np.save(folder / "img_emb" / "img_emb_12.npy", vectors)
    np.save(folder / "text_emb" / "text_emb_12.npy", vectors)
    pq.write_table(pa.Table.from_pylist(far), folder / "metadata" / "metadata_12.parquet")

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read()
    units = EmbedParts(str(made.store), "", str(folder), (), 4)
    assert len(units.make(tmp_path / "made", 0)) == 3
    assert read() - before < 2 * vectors.nbytes / 10


def test_neighbours_need_an_encoder_or_no_dropout(made, source, tmp_path):
    build(made, write_vectors(tmp_path / "vectors", *source), tmp_path / "bank")
    options = NeighbourOptions(str(tmp_path / "bank"), str(tmp_path / "n"), workers=1)
    with pytest.raises(ConfigError, match="--query-dropout 0"):
        find_neighbours(options)
    stored = NeighbourOptions(str(tmp_path / "bank"), str(tmp_path / "n"), query_dropout=0, text_variants=1, workers=1)
    find_neighbours(stored)
    ids, scores = NeighbourTable.open(tmp_path / "n").candidates(5, "text")
    assert (ids >= 0).any() and scores[0] == scores.max()
    given = NeighbourOptions(str(tmp_path / "bank"), str(tmp_path / "m"), encoder=str(made.encoder), workers=1)
    assert find_neighbours(given).with_text == 50


@pytest.mark.parametrize("column", ["caption", "shard"])
def test_a_row_of_another_document_is_refused(made, source, tmp_path, column):
    rows, image, text = source
    rows = [row | ({"shard": "part-0.tar"} if column == "shard" else {}) for row in rows]
    rows[3] = rows[3] | {"caption": "of something else"}
    folder = write_vectors(tmp_path / "vectors", rows, image, text)
    with pytest.raises(
        DataError, match="caption 'of something else'" if column == "caption" else "no vectors for|caption"
    ):
        build(made, folder, tmp_path / "bank")


def test_missing_repeated_and_nameless_rows_are_refused(made, source, tmp_path):
    rows, image, text = source
    with pytest.raises(DataError, match="no vectors for"):
        build(made, write_vectors(tmp_path / "a", rows[1:], image[1:], text[1:]), tmp_path / "bank")
    twice = [*rows, rows[0]]
    extended = [np.concatenate([array, array[:1]]) for array in (image, text)]
    with pytest.raises(DataError, match="more than one row"):
        build(made, write_vectors(tmp_path / "b", twice, *extended), tmp_path / "bank")
    nameless = [{"caption": row["caption"]} for row in rows]
    with pytest.raises(DataError, match="no column key; it has caption"):
        build(made, write_vectors(tmp_path / "c", nameless, image, text), tmp_path / "bank")


def test_numbers_that_are_none_are_refused(made, source, tmp_path):
    rows, image, text = source
    text = text.copy()
    text[7, 3] = np.nan
    with pytest.raises(DataError, match="zero or not finite"):
        build(made, write_vectors(tmp_path / "a", rows, image, text), tmp_path / "bank")


def test_counts_and_widths_that_differ_are_refused(made, source, tmp_path):
    rows, image, text = source
    folder = write_vectors(tmp_path / "a", rows, image, text)
    (folder / "text_emb" / "text_emb_10.npy").unlink()
    with pytest.raises(DataError, match="2 in img_emb, 1 in text_emb, 2 in metadata"):
        build(made, folder, tmp_path / "bank")
    folder = write_vectors(tmp_path / "b", rows, image, text)
    np.save(folder / "img_emb" / "img_emb_2.npy", image[:3])
    with pytest.raises(DataError, match=r"shape \(3, 64\).*25 rows"):
        build(made, folder, tmp_path / "bank")
    folder = write_vectors(tmp_path / "c", rows, image, text[:, :16])
    with pytest.raises(DataError, match=r"widths \[16, 64\]"):
        build(made, folder, tmp_path / "bank")
    with pytest.raises(DataError, match="does not exist"):
        build(made, tmp_path / "nothing", tmp_path / "bank")
