"""TFRecord, WARC and WET, and datatrove's filters: read whole or refused. Each needs optional packages."""

import gzip
import io

import pytest

from megacm3.data.filters import NAMES, build_filters
from megacm3.data.sources import ReadOptions, Rejected, Sample, find_shards, iter_texts, read_shard
from megacm3.errors import ConfigError, DataError
from tests.unit.data.makers import picture


def read(path, **options):
    items = [item for shard in find_shards(str(path)) for item in read_shard(shard, ReadOptions(**options))]
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, Rejected)]


# ---- TFRecord


def write_tfrecord(path, count=4, names=("image", "caption")):
    tfrecord = pytest.importorskip("tfrecord")
    writer = tfrecord.TFRecordWriter(str(path))
    for n in range(count):
        writer.write(
            {names[0]: (picture(n), "byte"), names[1]: (f"caption number {n}".encode(), "byte"), "n": (n, "int")}
        )
    writer.close()
    return path


@pytest.mark.parametrize("name", ["a.tfrecord", "a.tfrecords", "a.tfrecord-00000-of-00010"])
def test_tfrecord(tmp_path, name):
    samples, rejects = read(write_tfrecord(tmp_path / name))
    assert [s.parts for s in samples] == [(f"caption number {n}", picture(n)) for n in range(4)]
    assert not rejects and samples[2].meta["n"] == 2


def test_tfrecord_with_tensorflow_s_names_and_gzip(tmp_path):
    path = write_tfrecord(tmp_path / "a.tfrecord", names=("image/encoded", "image/caption"))
    with gzip.open(tmp_path / "b.tfrecord.gz", "wb") as file:
        file.write(path.read_bytes())
    samples, _ = read(tmp_path / "b.tfrecord.gz")
    assert [s.parts for s in samples] == [(f"caption number {n}", picture(n)) for n in range(4)]


@pytest.mark.parametrize("place", [3, 9, 200, -2])
def test_one_flipped_bit_in_a_tfrecord(tmp_path, place):
    path = write_tfrecord(tmp_path / "a.tfrecord")
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.tfrecord is damaged"):
        read(path)


@pytest.mark.parametrize("cut", [4, 100, -1, -30])
def test_truncated_tfrecord(tmp_path, cut):
    path = write_tfrecord(tmp_path / "a.tfrecord")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"a\.tfrecord is damaged"):
        read(path)


# ---- WARC and WET

PAGE = "<html><body><article>" + "<p>{}</p>" * 3 + "</article></body></html>"
TEXT = "The quick brown fox jumps over the lazy dog and runs away with the cat. " * 3


def write_warc(path, kind, texts):
    warcio = pytest.importorskip("warcio")
    pytest.importorskip("cchardet")
    pytest.importorskip("magic")
    from warcio.warcwriter import WARCWriter

    with open(path, "wb") as file:
        writer = WARCWriter(file, gzip=path.suffix == ".gz")
        for n, text in enumerate(texts):
            mime = {"WARC-Identified-Payload-Type": "text/plain" if kind == "conversion" else "text/html"}
            http = None
            if kind == "response":
                http = warcio.StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.0")
            content = io.BytesIO(text.encode())
            record = writer.create_warc_record(
                f"http://example.com/{n}", kind, payload=content, http_headers=http, warc_headers_dict=mime,
                warc_content_type="text/plain" if kind == "conversion" else None,
            )  # fmt: skip
            writer.write_record(record)
    return path


def test_wet(tmp_path):
    path = write_warc(tmp_path / "a.warc.wet.gz", "conversion", [f"{TEXT} number {n}" for n in range(3)] + [" "])
    samples, rejects = read(path)
    assert [s.parts[0] for s in samples] == [f"{TEXT} number {n}" for n in range(3)]
    assert samples[1].meta["url"] == "http://example.com/1" and [r.reason for r in rejects] == ["filter:empty_text"]
    assert list(iter_texts(find_shards(str(path)))) == [s.parts[0] for s in samples]


def test_truncated_wet(tmp_path):
    path = write_warc(tmp_path / "a.warc.wet.gz", "conversion", [TEXT] * 5)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="is damaged"):
        read(path)


def test_warc_pages(tmp_path):
    pytest.importorskip("trafilatura")
    pages = [PAGE.format(TEXT, f"Paragraph {n}. " * 10, TEXT) for n in range(2)]
    samples, _ = read(write_warc(tmp_path / "a.warc.gz", "response", pages))
    assert len(samples) == 2 and "Paragraph 1" in samples[1].parts[0] and "<p>" not in samples[1].parts[0]
    # The same page twice gives the same text: nothing depends on what was read before.
    samples, _ = read(write_warc(tmp_path / "b.warc.gz", "response", [pages[0]] * 6))
    assert len({s.parts for s in samples}) == 1 and len(samples) == 6


# ---- filters


def test_unknown_filter():
    with pytest.raises(ConfigError, match="expected one of gopher-quality"):
        build_filters(["gofer"])


def test_filters_leave_out_texts_but_never_pairs(tmp_path):
    pytest.importorskip("spacy")
    (tmp_path / "a.txt").write_text("short\n" + TEXT * 4 + "\n")
    samples, rejects = read(tmp_path / "a.txt", text_filters=("gopher-quality",))
    assert len(samples) == 1 and [r.reason for r in rejects] == ["filter:gopher_short_doc"]
    _, rejects = read(tmp_path / "a.txt", text_filters=("gopher-quality", "gopher-repetition"))
    assert rejects[1].reason.startswith("filter:") and rejects[1].reason != "filter:gopher_short_doc"
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "b.jsonl").write_text('{"caption": "short", "image": "0.png"}\n{"text": "short"}\n')
    samples, rejects = read(tmp_path / "b.jsonl", text_filters=("gopher-quality",))
    assert [s.images for s in samples] == [1] and len(rejects) == 1


def test_every_filter_can_be_built():
    pytest.importorskip("spacy")
    for apply in build_filters(NAMES):
        assert isinstance(apply(TEXT), tuple)
