"""Files that are whole or absent, and the `manifest.json` that names what made a folder.

Every artefact (tokenizer, encoder, store, bank, neighbours, checkpoint step) is a folder with such a manifest; the next
stage refuses a mismatch by comparing fingerprints.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacm3 import __version__
from megacm3.errors import ConfigError, DataError, Megacm3Error

MANIFEST = "manifest.json"


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes, read in 8 MiB blocks."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of the canonical JSON text of `value` (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, and `folder` itself."""
    for root, _, names in os.walk(folder):
        for name in names:
            _fsync(Path(root) / name)
        _fsync(Path(root))


def check_output(path: str | Path, flag: str = "--output", *, file: bool = False) -> None:
    """Raises ConfigError where no folder (or `file`) can be made at `path`: to be called before the work for it."""
    if not str(path):
        raise ConfigError(f"{flag} is empty; expected a path")
    if file and Path(path).is_dir():
        raise ConfigError(f"{flag} {path} is a folder; expected the name of a file")
    place = Path(path).absolute().parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"{flag} {path}: {place} is a file; expected a folder there")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag} {path}: no right to write in {place}; give another {flag}")


@contextmanager
def new_file(final: str | Path) -> Iterator[Path]:
    """A path to write to; on success it is fsynced and renamed to `final`, on any error it is removed."""
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, final)
        _fsync(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(final: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder to write into; on success it is fsynced and renamed to `final`, on any error it is removed.

    Raises DataError when `final` exists already and `replace` is false (an empty folder may always be replaced).
    """
    final = Path(final)
    occupied = final.exists() and (not final.is_dir() or any(final.iterdir()))
    if occupied and not replace:
        raise DataError(f"{final} exists already; give another --output or remove it")
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        fsync_tree(temporary)
        if final.exists():
            retired = final.with_name(f".{final.name}.{os.getpid()}.old")
            os.replace(final, retired)
            os.replace(temporary, final)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            os.replace(temporary, final)
        _fsync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path, *, error: type[Megacm3Error] = DataError) -> Any:
    """The JSON value in `path`; `error` with the path when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as fault:
        raise error(f"{path} does not exist") from fault
    except (UnicodeDecodeError, json.JSONDecodeError) as fault:
        raise error(f"{path} is not JSON: {fault}") from fault


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says of its folder."""

    kind: str
    """What the folder is: text_tokenizer, image_tokenizer, encoder, store, bank, neighbours or checkpoint."""
    settings: dict[str, Any]
    """The settings that shaped the content."""
    inputs: dict[str, str]
    """Fingerprints of the artefacts that it was made from, by role."""
    files: dict[str, dict[str, Any]]
    """Relative path -> {"bytes": int, "sha256": hex}."""
    fingerprint: str
    """sha256 over kind, settings, inputs and the files' hashes: equal content has an equal fingerprint."""


def _fingerprint(kind: str, settings: dict[str, Any], inputs: dict[str, str], files: dict[str, dict[str, Any]]) -> str:
    hashes = {name: entry["sha256"] for name, entry in files.items()}
    return sha256_json({"kind": kind, "settings": settings, "inputs": inputs, "files": hashes})


def write_manifest(
    folder: str | Path,
    kind: str,
    settings: dict[str, Any],
    inputs: dict[str, str],
    files: dict[str, dict[str, Any]] | None = None,
) -> Manifest:
    """Hash every file below `folder` and write its manifest, as the last file of the folder.

    `files` may hand in entries that are known already (relative path -> bytes, sha256), so that big parts written by
    several workers are not read again.
    """
    folder, known = Path(folder), files or {}
    entries = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            entries[name] = known.get(name) or {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    settings = json.loads(json.dumps(settings))
    fingerprint = _fingerprint(kind, settings, inputs, entries)
    write_json(
        folder / MANIFEST,
        {
            "kind": kind,
            "format": 1,
            "fingerprint": fingerprint,
            "settings": settings,
            "inputs": inputs,
            "files": entries,
            "made_by": {"megacm3": __version__},
        },
    )
    return Manifest(kind, settings, inputs, entries, fingerprint)


def read_manifest(
    folder: str | Path, kind: str, *, verify: str = "size", error: type[Megacm3Error] = DataError
) -> Manifest:
    """The manifest of `folder`, checked.

    verify: "none", "size" (every file is there with its size) or "sha256" (and has its hash). Raises `error` naming the
    folder, what was found and what was expected.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise error(f"{folder} does not exist (expected a folder of kind '{kind}')")
    if not (folder / MANIFEST).is_file():
        raise error(f"{folder} has no {MANIFEST}: it is unfinished or not a folder of kind '{kind}'")
    raw = read_json(folder / MANIFEST, error=error)
    fields = ("kind", "settings", "inputs", "files", "fingerprint")
    if not isinstance(raw, dict) or any(name not in raw for name in fields):
        raise error(f"{folder / MANIFEST} lacks one of the fields {', '.join(fields)}")
    if raw["kind"] != kind:
        raise error(f"{folder} is of kind '{raw['kind']}'; expected '{kind}'")
    for name, entry in raw["files"].items() if verify != "none" else ():
        _check_file(folder, name, entry, verify, error)
    found = _fingerprint(raw["kind"], raw["settings"], raw["inputs"], raw["files"])
    if found != raw["fingerprint"]:
        raise error(f"{folder / MANIFEST} was changed by hand: its fingerprint does not match its content")
    return Manifest(raw["kind"], raw["settings"], raw["inputs"], raw["files"], raw["fingerprint"])


def _check_file(folder: Path, name: str, entry: dict[str, Any], verify: str, error: type[Megacm3Error]) -> None:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise error(f"{folder / MANIFEST} names a file outside its folder: {name}")
    if not path.is_file():
        raise error(f"{path} is missing (named in {MANIFEST})")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise error(f"{path} has {size} bytes; its manifest says {entry['bytes']}")
    if verify == "sha256":
        digest = sha256_file(path)
        if digest != entry["sha256"]:
            raise error(f"{path} is damaged: sha256 {digest[:16]}..., its manifest says {entry['sha256'][:16]}...")
