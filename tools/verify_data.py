"""Read a store, a memory bank or a neighbour folder completely and say whether it is whole."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run
from megacm3.errors import DataError
from megacm3.files import MANIFEST, read_json, read_manifest


def main(arguments: list[str] | None = None) -> int:
    """Find out what the folder is, verify it, print what was counted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", metavar="PATH", help="folder with a manifest.json")
    folder = Path(parser.parse_args(arguments).path)
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; expected a store, a bank or a neighbour folder")
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} has no {MANIFEST}: it is unfinished, or no store, bank or neighbour folder")
    manifest = read_json(folder / MANIFEST)
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    if kind == "store":
        from megacm3.data.store import verify_store

        found = verify_store(folder)
        counted = (
            f"{found.documents} documents, {found.text_segments} text and {found.image_segments} image segments, "
            f"{found.tokens} tokens, {found.rejects} rejects"
        )
    elif kind in ("bank", "neighbours"):
        from megacm3.retrieval.verify import verify_bank, verify_neighbours

        check = (verify_bank if kind == "bank" else verify_neighbours)(folder)
        counted = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in vars(check).items())
    elif isinstance(kind, str):
        counted = f"{len(read_manifest(folder, kind, verify='sha256').files)} files with the right hashes"
    else:
        raise DataError(f"{folder / MANIFEST} names no kind")
    print(f"{folder}: {kind} is whole: {counted}")
    return 0


if __name__ == "__main__":
    run(main)
