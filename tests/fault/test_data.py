"""Faults 18 to 22: damaged stores, banks and encoders are refused with the place; killed offline jobs go on."""

import os
import random
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megacm3.data.store import KIND, Store
from megacm3.errors import DataError
from megacm3.files import read_manifest, write_manifest
from megacm3.retrieval.bank import MemoryBank
from megacm3.retrieval.build_bank import build_bank
from megacm3.retrieval.index import new_index
from megacm3.retrieval.shards import write_shard
from megacm3.retrieval.train_encoder import EncoderOptions, make_encoder
from tests.helpers.distributed import RankError, run_distributed
from tests.helpers.runs import the_error, tool, train_ranks, write_config
from tests.helpers.tools import run_tool
from tests.unit.data.test_pretokenize import command, options, reference, same, shards, tokenizers
from tests.unit.retrieval.conftest import Made, copy, flip, made, same_bytes
from tests.unit.retrieval.makers import DIM, TINY

__all__ = ["copy", "made", "reference", "shards", "tokenizers"]  # fixtures
pytestmark = pytest.mark.long


def as_if_made_so(folder: Path, kind: str) -> None:
    """Write the manifest anew, so that sizes and hashes fit what a bad tool or a bad disk left."""
    manifest = read_manifest(folder, kind, verify="none")
    (folder / "manifest.json").unlink()
    write_manifest(folder, kind, manifest.settings, manifest.inputs)


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def poke(path: Path, place: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[place : place + len(value)] = value
    path.write_bytes(bytes(data))


def refused(config: Path, out: Path, *words: str) -> None:
    """The trainer ends with exit code 3 on every rank, and with one error line in these words."""
    error = the_error(train_ranks(config, out), 3)
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", ("part-00000.bin has", "bytes; its manifest says")),
        ("zero length", ("part-00000.bin has 0 bytes; its manifest says",)),
        ("bad magic", ("part-00000.idx is not an index that this store writes",)),
        ("index longer than data", ("part-00000.bin has", "its index ends at")),
    ],
)
def test_18_a_token_shard_is_damaged(how: str, words: tuple[str, ...], tmp_path: Path) -> None:
    config = write_config(tmp_path)
    part = tmp_path / "store" / "tokens" / "part-00000"
    data, index = part.with_suffix(".bin"), part.with_suffix(".idx")
    if how == "truncated":
        cut(data, data.stat().st_size - 1)
    elif how == "zero length":
        cut(data, 0)
    elif how == "bad magic":
        poke(index, 0, b"MMIDIDY")
    else:
        cut(data, data.stat().st_size - 100)
    if how in ("bad magic", "index longer than data"):
        as_if_made_so(tmp_path / "store", KIND)
    refused(config, tmp_path / "run", *words)
    assert not (tmp_path / "run/metrics.jsonl").exists(), "a step was trained"
    code, said = run_tool("verify_data", tmp_path / "store")
    assert code == 3 and all(word in said for word in words), said


def _index_arrays(index: Path) -> tuple[int, int]:
    """Where the lengths (int32) and the byte offsets (int64) of an index begin."""
    sequences = struct.unpack_from("<9sQBQQ", index.read_bytes())[3]
    return 34, 34 + 4 * sequences


@pytest.mark.parametrize("how", ["an id outside the vocabulary", "a picture of another size"])
def test_19_tokens_that_no_vocabulary_has(how: str, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    before = Store.open(tmp_path / "store").document(0).segments[0].tokens
    part, caption = tmp_path / "store" / "tokens" / "part-00000", len(before)
    if how == "an id outside the vocabulary":
        # A text id that would be an image token's: silent, without a check.
        poke(part.with_suffix(".bin"), 2 * (caption - 1), struct.pack("<H", 300))
        words = ("tokens/part-00000: document 0:", "..300 outside 0..255", f"first at position {caption - 1}")
    else:
        lengths, offsets = _index_arrays(part.with_suffix(".idx"))
        poke(part.with_suffix(".idx"), lengths, struct.pack("<ii", caption + 1, 15))
        poke(part.with_suffix(".idx"), offsets + 8, struct.pack("<q", 2 * (caption + 1)))
        words = ("tokens/part-00000: document 0:", "an image has 15 codes; expected exactly 16")
    as_if_made_so(tmp_path / "store", KIND)
    refused(config, tmp_path / "run", *words)
    code, said = run_tool("verify_data", tmp_path / "store")
    assert code == 3 and all(word in said for word in words), said


@pytest.mark.parametrize("seed", [0, 1])
def test_20_the_pretokenizer_is_killed_at_random_moments(
    seed: int, tokenizers: Path, shards: Path, reference: Path, tmp_path: Path
) -> None:
    moments, output, work = random.Random(seed), tmp_path / "store", tmp_path / "store.work"
    killed = 0
    for _ in range(2):
        with subprocess.Popen(
            command(tokenizers, shards / "*.tar", output, "--workers", "1"),
            start_new_session=True,
            stderr=subprocess.DEVNULL,
        ) as process:
            while not work.is_dir() and process.poll() is None:
                time.sleep(0.01)
            try:
                process.wait(moments.uniform(0.0, 2.0))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                killed += 1
        # A store under its name is a whole one.
        assert not output.exists() or same(reference, output)
    from megacm3.data.pretokenize import pretokenize

    pretokenize(options(tokenizers, shards / "*.tar", output))
    assert same(reference, output), "other bytes than those of the run that was not killed"
    assert killed >= 1


def _flipped(bank: Path, made: Made) -> None:
    flip(bank / "index" / "shard-00001-of-00003.faiss")


def _shortened(bank: Path, made: Made) -> None:
    shard = bank / "index" / "shard-00001-of-00003.faiss"
    cut(shard, shard.stat().st_size - 1)


def _fewer_vectors(bank: Path, made: Made) -> None:
    vectors = MemoryBank.open(made.bank).embeddings.documents(np.arange(4))
    write_shard(bank / "index" / "shard-00001-of-00003.faiss", new_index("Flat", DIM), [(np.arange(4), vectors)])
    as_if_made_so(bank, "bank")


def _other_numbers(bank: Path, made: Made) -> None:
    vectors = MemoryBank.open(made.bank).embeddings.documents(np.arange(20, 40))
    # As after a merge without an offset of the ids: right vectors, wrong documents.
    write_shard(bank / "index" / "shard-00001-of-00003.faiss", new_index("Flat", DIM), [(np.arange(20), vectors)])
    as_if_made_so(bank, "bank")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_flipped, r"shard-00001-of-00003.faiss is damaged: .*sha256"),
        (_shortened, r"shard-00001-of-00003.faiss has \d+ bytes; its manifest says \d+"),
        (_fewer_vectors, r"index holds 34 vectors.*manifest says 50"),
        (_other_numbers, r"other document numbers|gave document"),
    ],
)
def test_21_a_damaged_index_gives_no_neighbours(
    harm: Callable[[Path, Made], None], message: str, made: Made, copy: Callable[[Path], Path], tmp_path: Path
) -> None:
    bank = copy(made.bank)
    harm(bank, made)
    code, said = run_tool("verify_data", bank)
    assert code == 3
    with pytest.raises(DataError, match=message):
        raise DataError(said)
    if harm is not _other_numbers:  # only a whole comparison can see that; neighbours.py names documents by the store
        arguments = ("--bank", bank, "--encoder", made.encoder, "--output", tmp_path / "n", "--workers", "1")
        code, said = run_tool("find_neighbours", *arguments)
        assert code == 3 and not (tmp_path / "n").exists(), said


def test_21_embeddings_of_another_encoder(made: Made, tmp_path: Path) -> None:
    make_encoder(EncoderOptions((made.inputs,), str(tmp_path / "other"), replace(TINY, steps=1)))
    arguments = ("--bank", made.bank, "--encoder", tmp_path / "other", "--output", tmp_path / "n", "--workers", "1")
    code, said = run_tool("find_neighbours", *arguments)
    assert code == 3 and "another encoder" in said and not (tmp_path / "n").exists()


def test_22_the_bank_s_build_is_killed_between_shards(made: Made, tmp_path: Path) -> None:
    bank, options = tmp_path / "bank", made.bank_options(tmp_path / "bank")
    words = ["--store", str(made.store), "--input", *options.inputs, "--encoder", str(made.encoder)]
    words += ["--output", str(bank), "--shard-size", "20", "--workers", "1"]
    with pytest.raises(RankError, match="SIGKILL"):
        run_distributed(tool, 1, name="build_memory_bank", arguments=words, fault="bank.shard:number=1:kill9")
    assert not bank.exists() and len(list((tmp_path / "bank.work").rglob("shard-0000*.faiss"))) == 1
    run_distributed(tool, 1, name="build_memory_bank", arguments=words, fault="")
    assert same_bytes(bank, made.bank)


def test_22_one_two_and_four_shards_find_the_same(made: Made, tmp_path: Path) -> None:
    found = []
    for shards_wanted, rows in ((1, 50), (2, 25), (4, 13)):
        folder = tmp_path / str(shards_wanted)
        assert build_bank(made.bank_options(folder, shard_rows=rows)).shards == shards_wanted
        bank = MemoryBank.open(folder)
        found.append(bank.search(bank.embeddings.documents(np.arange(50)), 10))
    for scores, ids in found[1:]:
        np.testing.assert_array_equal(ids, found[0][1])
        np.testing.assert_allclose(scores, found[0][0], rtol=1e-6)
