"""Readers: every format gives the same samples, every fault of the input a named reject or a clear error."""

import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megacm3.data.images import Reject
from megacm3.data.sources import (
    ReadOptions,
    Rejected,
    Sample,
    clean_text,
    find_shards,
    identify,
    iter_texts,
    read_shard,
)
from megacm3.errors import DataError
from tests.unit.data.makers import pairs, picture, write_tar


def read(path, **options):
    items = [item for shard in find_shards(str(path)) for item in read_shard(shard, ReadOptions(**options))]
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, Rejected)]


def check_pairs(samples, first=0):
    for number, sample in enumerate(samples, first):
        assert sample.parts == (f"caption number {number}", picture(number)), sample.key
        assert sample.row == number - first


# ---- webdataset


def test_tar(tmp_path):
    samples, rejects = read(write_tar(tmp_path / "a.tar", pairs(0, 5)))
    check_pairs(samples)
    assert not rejects and samples[3].key == "00003" and samples[3].meta == {"n": 3} and samples[3].shard == "a.tar"


def test_tar_order_of_members_does_not_matter(tmp_path):
    members = pairs(0, 4)
    shuffled = [members[i] for n in range(4) for i in (3 * n + 2, 3 * n + 1, 3 * n)]
    check_pairs(read(write_tar(tmp_path / "a.tar", shuffled))[0])


def test_tar_caption_from_json_and_capital_suffix(tmp_path):
    members = [("x.PNG", picture(0)), ("x.json", json.dumps({"caption": "from json"}).encode())]
    samples, _ = read(write_tar(tmp_path / "a.tar", members))
    assert samples[0].parts == ("from json", picture(0))


def test_tar_gz(tmp_path):
    plain = write_tar(tmp_path / "a.tar", pairs(0, 3))
    with gzip.open(tmp_path / "b.tar.gz", "wb") as file:
        file.write(plain.read_bytes())
    check_pairs(read(tmp_path / "b.tar.gz")[0])


@pytest.mark.parametrize("where", ["inside a member", "inside a header", "at a member", "before the end mark"])
def test_cut_tar(tmp_path, where):
    path = write_tar(tmp_path / "a.tar", pairs(0, 6))
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    fifth = members[13]
    cut = {
        "inside a member": members[12].offset_data + 100,
        "inside a header": fifth.offset + 100,
        "at a member": fifth.offset,
        "before the end mark": members[-1].offset_data + 512,
    }[where]
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"a\.tar is damaged.*--allow-partial"):
        read(path)
    samples, rejects = read(path, allow_partial=True)
    check_pairs(samples)
    assert len(samples) == (5 if where == "before the end mark" else 4)
    assert {reject.reason for reject in rejects} == {"cut_off", "damaged_shard"}


def test_tar_with_fewer_samples_than_its_statistics(tmp_path):
    path = write_tar(tmp_path / "00000.tar", pairs(0, 4))
    (tmp_path / "00000_stats.json").write_text(json.dumps({"count": 6, "successes": 5}))
    with pytest.raises(DataError, match=r"4 samples, its _stats\.json says 5"):
        read(path)
    (tmp_path / "00000_stats.json").write_text(json.dumps({"count": 6, "successes": 4}))
    assert len(read(path)[0]) == 4


def test_keys_apart_are_rejected_not_mispaired(tmp_path):
    members = [("0.png", picture(0)), ("1.png", picture(1)), ("0.txt", b"zero"), ("1.txt", b"one"), *pairs(2, 1)]
    samples, rejects = read(write_tar(tmp_path / "a.tar", members))
    assert [sample.key for sample in samples] == ["00002"]
    assert {(r.key, r.reason) for r in rejects} == {("0", "key_not_adjacent"), ("1", "key_not_adjacent")}


def test_duplicate_name_is_rejected(tmp_path):
    members = [("0.png", picture(0)), ("0.png", picture(1)), ("0.txt", b"which"), *pairs(2, 1)]
    samples, rejects = read(write_tar(tmp_path / "a.tar", members))
    assert [sample.key for sample in samples] == ["00002"] and [r.reason for r in rejects] == ["duplicate_name"]
    assert "0.png" in rejects[0].detail


def test_half_samples_are_rejected(tmp_path):
    members = [
        ("a.png", picture(0)),
        ("b.txt", b"alone"),
        ("c.png", picture(1)),
        ("c.jpg", picture(2)),
        ("c.txt", b"c"),
    ]
    samples, rejects = read(write_tar(tmp_path / "a.tar", members))
    assert not samples and {r.key: r.reason for r in rejects} == {"a": "no_caption", "b": "no_image", "c": "two_images"}


def test_links_and_nameless_members_are_rejected(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("README"))
    samples, rejects = read(path)
    assert not samples and [r.reason for r in rejects] == ["not_a_sample", "not_a_sample"]


def test_a_member_with_holes_is_rejected_not_misread(tmp_path):
    # GNU's sparse members hold a map of their data, which is not where the header says.
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("caption")
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    os.truncate(tmp_path / "0.png", 1 << 20)
    names = ["0.png", "0.txt", "1.png", "1.txt"]
    subprocess.run(["tar", "--sparse", "-cf", "a.tar", *names], cwd=tmp_path, check=True)
    samples, rejects = read(tmp_path / "a.tar")
    assert [s.parts for s in samples] == [("caption", picture(1))]
    assert [(r.key, r.reason) for r in rejects] == [("0", "not_a_sample")] and "holes" in rejects[0].detail


def test_a_tar_that_shrinks_while_it_is_read(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(0, 40))
    items = read_shard(find_shards(str(path))[0])
    next(items)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match="became shorter"):
        list(items)


def test_data_after_the_end_mark_is_not_lost_unseen(tmp_path):
    one, two = (write_tar(tmp_path / f"{n}.tar", pairs(n, 4)).read_bytes() for n in (0, 4))
    with tarfile.open(tmp_path / "0.tar") as tar:
        hole = tar.getmembers()[6].offset
    (tmp_path / "joined.tar").write_bytes(one + two)
    (tmp_path / "hole.tar").write_bytes(one[:hole] + bytes(2048) + one[hole + 2048 :])
    for name, left in (("joined.tar", 3), ("hole.tar", 1)):
        with pytest.raises(DataError, match="data follows the end-of-archive mark"):
            read(tmp_path / name)
        samples, rejects = read(tmp_path / name, allow_partial=True)
        check_pairs(samples)
        assert len(samples) == left and [r.reason for r in rejects] == ["cut_off", "damaged_shard"]
    (tmp_path / "padded.tar").write_bytes(one + bytes(3 << 20))
    check_pairs(read(tmp_path / "padded.tar")[0])


@pytest.mark.parametrize(("kind", "some"), [("gz", True), ("xz", True), ("bz2", False)])
def test_damaged_compressed_tars(tmp_path, kind, some):
    with tarfile.open(tmp_path / "a.tar", f"w:{kind}") as tar:
        for name, data in pairs(0, 40):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 50] = b"\xff" * 50
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.tar is damaged"):
        read(tmp_path / "a.tar")
    samples, rejects = read(tmp_path / "a.tar", allow_partial=True)
    check_pairs(samples)
    assert bool(samples) == some and rejects[-1].reason == "damaged_shard"


@pytest.mark.parametrize("suffix", ["__bad__", "__key__", "__url__"])
def test_suffixes_that_webdataset_uses_itself(tmp_path, suffix):
    members = [*pairs(0, 1), (f"00001.{suffix}", b"x"), *pairs(1, 2)]
    samples, rejects = read(write_tar(tmp_path / "a.tar", members))
    assert [s.key for s in samples] == ["00000", "00002"] and [r.key for r in rejects] == ["00001"]


def test_names_that_are_not_unicode_are_spelt_out(tmp_path):
    name = b"\xff0".decode("utf-8", "surrogateescape")
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for file, data in ((f"{name}.png", picture(0)), (f"{name}.txt", b"caption"), (f"{name}1.png", picture(1))):
            info = tarfile.TarInfo(file)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    samples, rejects = read(tmp_path / "a.tar")
    assert [s.key for s in samples] == ["\\udcff0"] and [r.key for r in rejects] == ["\\udcff01"]


def test_not_a_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"something else" * 100)
    with pytest.raises(DataError, match="is damaged"):
        read(tmp_path / "a.tar")
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(DataError, match="is damaged"):
        read(tmp_path / "b.tar")


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (b"\xff\xfe bad", "invalid_utf8"),
        (b"nul \0 inside", "nul_in_text"),
        (b" \n\t ", "empty_text"),
        (b"", "empty_text"),
    ],
)
def test_bad_captions(tmp_path, caption, reason):
    members = [("0.png", picture(0)), ("0.txt", caption), *pairs(1, 1)]
    samples, rejects = read(write_tar(tmp_path / "a.tar", members))
    assert [r.reason for r in rejects] == [reason] and len(samples) == 1


def test_damaged_json_is_rejected(tmp_path):
    members = [("0.png", picture(0)), ("0.txt", b"x"), ("0.json", b"{"), *pairs(1, 1)]
    samples, rejects = read(write_tar(tmp_path / "a.tar", members))
    assert [r.reason for r in rejects] == ["invalid_json"] and len(samples) == 1


def test_captions_alone_do_not_need_pictures(tmp_path):
    write_tar(tmp_path / "a.tar", pairs(0, 3))
    assert list(iter_texts(find_shards(str(tmp_path / "a.tar")))) == [f"caption number {n}" for n in range(3)]


# ---- text


def test_clean_text():
    assert clean_text("e\u0301\r\n a\x07b ") == "\u00e9\n ab"
    assert clean_text(b"\xef\xbb\xbfmark") == "mark"
    assert clean_text("<break> & <b>") == "<break> & <b>"
    with pytest.raises(Reject, match="invalid_utf8"):
        clean_text("\ud800")


# ---- tables


def rows(count):
    return [{"key": f"k{n}", "caption": f"caption number {n}", "image": picture(n)} for n in range(count)]


def test_parquet_of_bytes_and_structs(tmp_path):
    pq.write_table(pa.Table.from_pylist(rows(4)), tmp_path / "a.parquet")
    check_pairs(read(tmp_path / "a.parquet")[0])
    structs = [row | {"image": {"bytes": row["image"], "path": None}} for row in rows(4)]
    pq.write_table(pa.Table.from_pylist(structs), tmp_path / "b.parquet", row_group_size=2)
    samples, _ = read(tmp_path / "b.parquet")
    check_pairs(samples)
    assert samples[2].key == "k2"


def test_parquet_rejects_and_errors(tmp_path):
    table = [
        {"caption": None, "image": picture(0)},
        {"caption": "x", "image": None},
        {"caption": "y", "image": picture(1)},
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet")
    samples, rejects = read(tmp_path / "a.parquet")
    assert [r.reason for r in rejects] == ["no_caption", "no_image"] and len(samples) == 1 and samples[0].row == 2
    pq.write_table(pa.Table.from_pylist([{"url": "x"}]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"columns url; expected one of caption"):
        read(tmp_path / "b.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="not a whole parquet"):
        read(tmp_path / "c.parquet")


def write_folder(folder: Path, count: int, name: str = "image") -> Path:
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for n in range(count):
        (folder / "pictures" / f"{n}.png").write_bytes(picture(n))
        lines.append(json.dumps({name: f"pictures/{n}.png", "caption": f"caption number {n}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_folder_with_jsonl(tmp_path):
    check_pairs(read(write_folder(tmp_path / "f", 4))[0])
    check_pairs(read(write_folder(tmp_path / "g", 4, "file_name") / "metadata.jsonl")[0])


def test_jsonl_may_not_leave_its_folder(tmp_path):
    (tmp_path / "secret.png").write_bytes(picture(0))
    folder = write_folder(tmp_path / "f", 1)
    lines = [{"image": "../secret.png", "caption": "x"}, {"image": str(tmp_path / "secret.png"), "caption": "x"}]
    lines.append({"image": "pictures/9.png", "caption": "x"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    samples, rejects = read(folder)
    assert not samples and [r.reason for r in rejects] == ["outside_folder", "outside_folder", "no_image"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (b'"x": ' + b"[" * 100_000 + b"]" * 100_000, "invalid_json"),
        (b'"x": ' + b"9" * 5000, "invalid_json"),
        (b'"image": "a\\u0000b.png"', "no_path"),
        (b'"image": "\\ud800.png"', "no_path"),
        (b'"image": "loop.png"', "no_path"),
        (b'"image": "' + b"x" * 400 + b'.png"', "no_image"),
        (b'"image": "0.png/x.png"', "no_image"),
    ],
)
def test_one_bad_row_costs_that_row_alone(tmp_path, fields, reason):
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "two", ' + fields + b'}\n{"text": "three"}\n')
    samples, rejects = read(tmp_path / "a.jsonl")
    assert [s.row for s in samples] == [0, 2] and [(r.row, r.reason) for r in rejects] == [(1, reason)]


def test_columns_that_no_row_can_be_written_with(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "key": "\\ud800"}\n{"\\udfff": 1}\n')
    samples, rejects = read(tmp_path / "a.jsonl")
    assert samples[0].key == "\\ud800" and rejects[0].detail == "its fields are \\udfff"


def test_parquet_rows_that_python_cannot_hold(tmp_path):
    offsets = pa.py_buffer(np.array([0, 1, 3, 4], np.int32).tobytes())
    texts = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xff\xfeb")])
    times = pa.array([0, 0, 2**62], pa.timestamp("us"))
    pq.write_table(pa.table({"caption": texts, "time": times}), tmp_path / "a.parquet")
    samples, rejects = read(tmp_path / "a.parquet")
    assert [s.parts for s in samples] == [("a",)]
    assert [(r.row, r.reason) for r in rejects] == [(1, "invalid_utf8"), (2, "unreadable_row")]


@pytest.mark.parametrize("place", [10, -200])
def test_damaged_gz_lines(tmp_path, place):
    data = bytearray(gzip.compress(b"\n".join(json.dumps({"text": f"{n**9}"}).encode() for n in range(5000))))
    data[place : place + 20] = b"\xff" * 20
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is damaged"):
        read(tmp_path / "a.jsonl.gz")


def test_text_only(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\nnot json\n{"text": ""}\n[1]\n')
    samples, rejects = read(tmp_path / "a.jsonl")
    assert [s.parts for s in samples] == [("one",), ("two",)]
    assert [r.reason for r in rejects] == ["invalid_json", "empty_text", "invalid_json"]
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "three"}\n')
    assert read(tmp_path / "b.jsonl.gz")[0][0].parts == ("three",)
    (tmp_path / "c.txt").write_text("four\nfive\n")
    assert [s.parts for s in read(tmp_path / "c.txt")[0]] == [("four",), ("five",)]
    data = (tmp_path / "b.jsonl.gz").read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(data[:-9])
    with pytest.raises(DataError, match="damaged"):
        read(tmp_path / "b.jsonl.gz")


def test_interleaved(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
    lines = [
        {"texts": ["one", None, "two", None], "images": [None, "0.png", None, "1.png"]},
        {"text": "a <image> b <image><image>", "images": ["0.png", "1.png", "2.png"]},
        {"texts": ["one", None], "images": [None]},
        {"text": "a <image> b", "images": []},
        {"texts": ["both"], "images": ["0.png"]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    samples, rejects = read(tmp_path / "a.jsonl")
    assert samples[0].parts == ("one", picture(0), "two", picture(1))
    assert samples[1].parts == ("a", picture(0), "b", picture(1), picture(2))
    assert samples[1].images == 3 and samples[1].caption == "a\nb"
    assert [r.reason for r in rejects] == ["unequal_lists"] * 3


def test_saved_data_set_and_imagefolder(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = {"image": [{"bytes": picture(n), "path": None} for n in range(5)]}
    table["text"] = [f"caption number {n}" for n in range(5)]
    datasets.Dataset.from_dict(table, features=features).save_to_disk(tmp_path / "saved")
    check_pairs(read(tmp_path / "saved")[0])
    shards = find_shards(str(tmp_path / "saved"), rows_per_unit=2)
    assert [shard.name for shard in shards] == ["saved[0:2]", "saved[2:4]", "saved[4:5]"]
    assert [s.row for shard in shards for s in read_shard(shard)] == [0, 1, 2, 3, 4]
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.png").write_bytes(picture(n))
    (folder / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{n}.png,caption number {n}\n" for n in range(3))
    )
    check_pairs(read(folder)[0])
    datasets.DatasetDict({"train": datasets.load_from_disk(str(tmp_path / "saved"))}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"holds the splits train; give one of them"):
        read(tmp_path / "splits")


# ---- finding


def test_globs_braces_folders_and_order(tmp_path):
    for n in range(3):
        write_tar(tmp_path / "in" / f"s-{n:03d}.tar", pairs(n, 1))
    names = ["s-000.tar", "s-001.tar", "s-002.tar"]
    for given in (
        f"{tmp_path}/in/*.tar",
        f"{tmp_path}/in/s-{{000..002}}.tar",
        f"{tmp_path}/in",
        f"{tmp_path}/**/*.tar",
    ):
        assert [shard.name for shard in find_shards(given)] == names
    reverse = [str(tmp_path / "in" / name) for name in reversed(names)] + [str(tmp_path / "in")]
    assert [shard.name for shard in find_shards(reverse)] == names


def test_what_a_folder_leaves_out_is_said(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", pairs(0, 1))
    (tmp_path / "a.parquet").write_bytes(b"")
    with caplog.at_level("INFO"):
        assert [shard.name for shard in find_shards(str(tmp_path))] == ["a.tar"]
    assert "1 files of other kinds, such as a.parquet, are left out" in caplog.text


def test_nothing_found(tmp_path):
    for given in (f"{tmp_path}/none/*.tar", f"{tmp_path}/none", [], str(tmp_path), f"{tmp_path}/s-{{0..1}}.tar", "x{"):
        with pytest.raises(DataError, match="--input"):
            find_shards(given)
    (tmp_path / "a.zip").write_bytes(b"x")
    with pytest.raises(DataError, match="no known kind"):
        find_shards(str(tmp_path / "a.zip"))


def test_identity_is_of_the_content_not_the_place(tmp_path):
    write_tar(tmp_path / "a" / "s.tar", pairs(0, 2))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = identify(find_shards(f"{tmp_path}/a/*.tar"))
    assert first == identify(find_shards(f"{tmp_path}/b/*.tar"))
    write_tar(tmp_path / "b" / "s.tar", pairs(1, 2))
    assert first != identify(find_shards(f"{tmp_path}/b/*.tar"))
