"""Webdataset tars, as img2dataset writes them: `KEY.jpg` (or .png, .webp ...), `KEY.txt` and `KEY.json` side by side.

webdataset splits the names and groups the members. Its silences are closed by a walk over the headers before: it says
nothing when a tar was cut at a member's border, gives half samples when the members of a key are not side by side, and
delivers the first of two files of one name. The walk notes where each member's data lies, so that headers are parsed
once and data is read in whole members, not through the stream reader's small blocks.
"""

import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from megacm3.data.images import Reject
from megacm3.data.sources import ReadOptions, Rejected, Sample, Shard, caption_of, clean_text, parse_json
from megacm3.errors import DataError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
TEXT_SUFFIXES = ("txt", "caption")
_BLOCK = 512
_UNREADABLE = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)
_REST = 1 << 20
"""Bytes looked at at once behind the end of a tar."""


@dataclass
class _Walk:
    """What the headers of a tar say."""

    rows: dict[str, int] = field(default_factory=dict)
    """Key -> position of its first member among the keys."""
    bad: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Key -> (reason, detail), for keys that cannot be trusted."""
    members: list[tuple[str, str, str, int, int]] = field(default_factory=list)
    """(name, key, suffix, first byte, bytes) of each file of a sample, in the order of the tar."""
    damage: str = ""
    """Why the tar is not whole; empty when it is."""


def _split(name: str) -> tuple[str | None, str | None]:
    from webdataset.tariterators import base_plus_ext

    return base_plus_ext(name)


def walk(path: str) -> _Walk:
    """Read all headers of a tar (not its data). Never raises for a damaged tar: `damage` says what is wrong."""
    found = _Walk()
    members: dict[str, set[str]] = {}
    last = None
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                if member.isdir() or _is_meta(member.name):
                    continue
                key, suffix = _split(member.name)
                if key is None or suffix is None or not member.isreg():
                    found.rows.setdefault(member.name, len(found.rows))
                    found.bad[member.name] = (
                        "not_a_sample",
                        "a link or device" if key else "a name without KEY.suffix",
                    )
                    continue
                seen = members.setdefault(key, set())
                if seen and key != last:
                    found.bad[key] = ("key_not_adjacent", f"{member.name} is apart from the other files of its key")
                if suffix.lower() in seen:
                    found.bad[key] = ("duplicate_name", f"{member.name} occurs twice")
                found.rows.setdefault(key, len(found.rows))
                if suffix.startswith("__"):
                    found.bad[key] = ("not_a_sample", f"{member.name} has a suffix of webdataset's own")
                if member.sparse is not None:
                    found.bad[key] = ("not_a_sample", f"{member.name} is stored with holes (tar --sparse)")
                seen.add(suffix.lower())
                found.members.append((member.name, key, suffix.lower(), member.offset_data, member.size))
                last = key
                tar.members = []  # type: ignore[attr-defined]
            found.damage = _missing_end(tar)
    except _UNREADABLE as fault:
        found.damage = str(fault) or type(fault).__name__
    if found.damage and last is not None:
        found.bad.setdefault(last, ("cut_off", "the last files before the damage"))
    return found


def _is_meta(name: str) -> bool:
    # webdataset's own rule for members that are about the shard, not of a sample.
    return re.match(r"__[^/]*__($|/)", name) is not None


def _missing_end(tar: tarfile.TarFile) -> str:
    # A whole tar ends with two blocks of zeros, and only zeros follow. tarfile accepts any end between two members, and
    # takes the first block of zeros for the end, even if samples come after it.
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(2 * _BLOCK)
    if len(end) < 2 * _BLOCK or any(end[:_BLOCK]):
        return "the end-of-archive mark is missing: the file was cut off"
    while end:
        if end.count(0) != len(end):
            return "data follows the end-of-archive mark: a hole in the file, or several tars put together by cat"
        end = tar.fileobj.read(_REST)
    return ""


def _expected_samples(path: str) -> int | None:
    # img2dataset's 00000_stats.json beside 00000.tar counts what was written.
    stats = os.path.splitext(path)[0] + "_stats.json"
    if not os.path.isfile(stats):
        return None
    with open(stats, "rb") as file:
        try:
            value = parse_json(file.read()).get("successes")
        except Reject as fault:
            raise DataError(f"{stats} is damaged: {fault}") from fault
    return value if isinstance(value, int) else None


def read_webdataset(shard: Shard, options: ReadOptions) -> Iterator[Sample | Rejected]:
    """The samples of one tar, rows numbered by key in the order of the file.

    Raises DataError when the tar is not whole (cut off, or fewer samples than its img2dataset statistics say), unless
    `options.allow_partial`.
    """
    found = walk(shard.path)
    expected = _expected_samples(shard.path)
    if not found.damage and expected is not None and expected != len(found.rows):
        found.damage = f"{len(found.rows)} samples, its _stats.json says {expected}"
    if found.damage and not options.allow_partial:
        raise DataError(
            f"{shard.path} is damaged: {found.damage}; repair it or take what is whole with --allow-partial"
        )
    for key, (reason, detail) in found.bad.items():
        yield Rejected(key, shard.name, found.rows[key], reason, detail)
    if found.damage:
        yield Rejected("", shard.name, len(found.rows), "damaged_shard", found.damage)
    for raw in _members(shard.path, found, options):
        key = raw["__key__"]
        row = found.rows[key]
        try:
            yield Sample(key, shard.name, row, _parts(raw, options), _meta(raw))
        except Reject as reject:
            yield Rejected(key, shard.name, row, reject.reason, reject.detail)


def _members(path: str, found: _Walk, options: ReadOptions) -> Iterator[dict[str, Any]]:
    from webdataset.tariterators import group_by_keys

    return group_by_keys(_files(path, found, options))


def _files(path: str, found: _Walk, options: ReadOptions) -> Iterator[dict[str, Any]]:
    # What webdataset's reader gives: name and data of each wanted member, then an end mark.
    wanted = [member for member in found.members if member[1] not in found.bad]
    # Of a damaged file, there may be nothing that can be opened.
    with tarfile.open(path, "r:*") if wanted else nullcontext() as tar:
        for name, _, suffix, start, size in wanted:
            if suffix in IMAGE_SUFFIXES and not options.pictures:
                continue
            assert tar is not None and tar.fileobj is not None
            tar.fileobj.seek(start)
            data = tar.fileobj.read(size)
            if len(data) != size:
                raise DataError(f"{path} became shorter while it was read: {name} has {len(data)} of {size} bytes")
            yield {"fname": name, "data": data, "__url__": os.path.basename(path)}
    yield {}


def _parts(raw: dict[str, Any], options: ReadOptions) -> tuple[str | bytes, ...]:
    text = next((raw[suffix] for suffix in TEXT_SUFFIXES if suffix in raw), None)
    if text is None and "json" in raw:
        text = caption_of(parse_json(raw["json"]))
    pictures = [suffix for suffix in IMAGE_SUFFIXES if suffix in raw]
    if text is None:
        raise Reject("no_caption", "no .txt file and no caption in .json")
    if not options.pictures:
        return (clean_text(text),)
    if not pictures:
        raise Reject("no_image", f"its files are {', '.join(sorted(k for k in raw if not k.startswith('__')))}")
    if len(pictures) > 1:
        raise Reject("two_images", f"both .{pictures[0]} and .{pictures[1]}")
    return (clean_text(text), raw[pictures[0]])


def _meta(raw: dict[str, Any]) -> dict[str, Any]:
    return parse_json(raw["json"]) if "json" in raw else {}
