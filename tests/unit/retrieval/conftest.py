"""What most tests of the room share, made once: input, store, trained encoder, bank, neighbours."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from megacm3.retrieval.build_bank import build_bank
from megacm3.retrieval.find_neighbours import find_neighbours
from megacm3.retrieval.options import BankOptions, NeighbourOptions
from megacm3.retrieval.train_encoder import EncoderOptions, make_encoder
from tests.unit.retrieval.makers import TINY, make_store, write_input


@dataclass(frozen=True)
class Made:
    """Paths of what was made."""

    root: Path
    inputs: str
    store: Path
    encoder: Path
    bank: Path
    neighbours: Path

    def bank_options(self, output: Path, **changes: object) -> BankOptions:
        """Options that make the same bank at `output`, but for `changes`."""
        given = {"store": str(self.store), "encoder": str(self.encoder), "inputs": (self.inputs,), "shard_rows": 20}
        return BankOptions(output=str(output), **(given | {"workers": 1} | changes))

    def neighbour_options(self, output: Path, **changes: object) -> NeighbourOptions:
        """Options that make the same neighbours at `output`, but for `changes`."""
        given = {"bank": str(self.bank), "block": 20, "search": 32, "keep": 8, "duplicate": 0.999, "workers": 1}
        return NeighbourOptions(output=str(output), **(given | changes))


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Made:
    root = tmp_path_factory.mktemp("retrieval")
    pattern = write_input(root / "input")
    make_store(root / "store", pattern)
    make_encoder(EncoderOptions((pattern,), str(root / "encoder"), TINY))
    names = ("store", "encoder", "bank", "neighbours")
    found = Made(root, pattern, *(root / name for name in names))
    build_bank(found.bank_options(found.bank))
    find_neighbours(found.neighbour_options(found.neighbours))
    return found


@pytest.fixture
def copy(tmp_path):
    """Copies a folder that a test may damage."""

    def copied(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name))

    return copied


def flip(path: Path, place: int = -20) -> None:
    """Flip one byte of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(bytes(data))


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    files = [
        sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) for folder in (one, other)
    ]
    return files[0] == files[1] and all((one / name).read_bytes() == (other / name).read_bytes() for name in files[0])
