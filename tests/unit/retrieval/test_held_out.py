"""A held-out store: its neighbours in the training bank, and its copies in that bank kept from every sample."""

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megacm3.errors import DataError
from megacm3.files import read_json, write_manifest
from megacm3.retrieval.bank import MemoryBank
from megacm3.retrieval.build_bank import build_bank
from megacm3.retrieval.copies import held_out_copies
from megacm3.retrieval.find_neighbours import find_neighbours
from megacm3.retrieval.neighbours import NeighbourTable
from megacm3.retrieval.options import BankOptions
from megacm3.retrieval.sampler import RetrievalSampler, open_sampler
from megacm3.retrieval.train_encoder import EncoderOptions, make_encoder
from megacm3.retrieval.verify import verify_neighbours
from tests.unit.data.makers import write_tar
from tests.unit.retrieval.makers import TINY, drawing, make_store


@dataclass(frozen=True)
class HeldOut:
    """A store of four documents and its bank."""

    inputs: str
    store: Path
    bank: Path


def upside_down(data: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def held_out(made, tmp_path_factory) -> HeldOut:
    root = tmp_path_factory.mktemp("held_out")
    pairs = {
        "new": (upside_down(drawing("red", "corner")), "a red corner upside down"),
        "picture": (drawing("green", "bar"), "words that no training caption has"),
        "caption": (upside_down(drawing("blue", "corner")), "A blue frame  on white"),
        "newer": (upside_down(drawing("brown", "corner")), "a brown corner upside down"),
    }
    members = []
    for key, (picture, caption) in pairs.items():
        members += [(f"{key}.webp", picture), (f"{key}.txt", caption.encode())]
    write_tar(root / "part-0.tar", members)
    store = make_store(root / "store", str(root / "part-*"))
    options = BankOptions(str(store.folder), str(made.encoder), str(root / "bank"), (str(root / "part-*"),), workers=1)
    build_bank(options)
    return HeldOut(str(root / "part-*"), root / "store", root / "bank")


@pytest.fixture(scope="module")
def foreign(made, held_out, tmp_path_factory) -> NeighbourTable:
    folder = tmp_path_factory.mktemp("foreign") / "neighbours"
    find_neighbours(made.neighbour_options(folder, queries=str(held_out.bank), duplicate=0.9999))
    return NeighbourTable.open(folder, "sha256")


def test_neighbours_of_a_held_out_store_are_documents_of_the_bank(made, held_out, foreign):
    bank, asking = MemoryBank.open(made.bank), MemoryBank.open(held_out.bank)
    documents = bank.embeddings.documents(np.arange(len(bank)))
    assert len(foreign) == 4 and foreign.foreign
    for doc in range(4):
        ids, scores = foreign.candidates(doc, "image")
        query = asking.embeddings.take("image", np.array([doc]))[0]
        ranked = bank.metadata.doc_ids[np.argsort(-(documents @ query), kind="stable")].tolist()
        own = asking.metadata.captions[doc]
        for number in ids.tolist():
            row = int(bank.metadata.rows(np.array([number]))[0])
            assert bank.metadata.captions[row] != own
        # The best that is neither of the same caption nor a copy.
        places = [ranked.index(number) for number in ids.tolist()]
        assert places == sorted(places) and places[0] <= 2
        np.testing.assert_allclose(scores, documents[bank.metadata.rows(ids)] @ query, atol=1e-3)


def test_a_number_of_the_held_out_store_is_not_taken_for_one_of_the_bank(foreign):
    # Document 0 of the bank is another picture than document 0 that asks: it may be drawn.
    sampler = RetrievalSampler(foreign, mode="random")
    drawn = {other for n in range(600) for other in sampler.sample(0, np.random.default_rng(n))}
    assert 0 in drawn
    own = foreign.asking.captions[2]
    same = set(foreign.metadata.doc_ids[foreign.metadata.captions == own].tolist())
    drawn = {other for n in range(600) for other in sampler.sample(2, np.random.default_rng(n))}
    assert same and not same & drawn


def test_copies_of_held_out_documents_are_marked_and_not_drawn(made, held_out, tmp_path):
    bank = MemoryBank.open(made.bank)
    marked = {
        row["key"] for row in bank.describe(bank.metadata.doc_ids[held_out_copies(bank, [held_out.bank], 0.9999)])
    }
    assert marked == {"green-bar", "blue-frame"}
    find_neighbours(made.neighbour_options(tmp_path / "n", held_out=(str(held_out.bank),), duplicate=0.9999))
    table = NeighbourTable.open(tmp_path / "n")
    keys = {row["doc_id"]: row["key"] for row in bank.describe(bank.metadata.doc_ids)}
    for mode in ("neighbours", "random"):
        sampler = RetrievalSampler(table, mode=mode, max_score=2.0)
        drawn = {keys[doc] for own in keys for n in range(20) for doc in sampler.sample(own, np.random.default_rng(n))}
        assert len(drawn) > 30 and not marked & drawn


def test_lists_of_a_held_out_store_are_verified(made, held_out, foreign):
    found = verify_neighbours(foreign.folder, bank=made.bank, share=1)
    # The asking bank lies elsewhere: nothing to compute again with.
    assert (found.documents, found.recomputed) == (4, 0)
    (foreign.folder.parent / "asking").symlink_to(held_out.bank)
    assert verify_neighbours(foreign.folder, bank=made.bank, share=1).recomputed == 4


def test_marks_are_found_again_and_missing_ones_told(made, held_out, tmp_path):
    find_neighbours(made.neighbour_options(tmp_path / "n", held_out=(str(held_out.bank),), duplicate=0.9999))
    found = verify_neighbours(tmp_path / "n", bank=made.bank, share=0)
    # The held-out bank lies elsewhere: nothing to compare with.
    assert (found.held_out, found.held_out_banks) == (2, 0)
    (tmp_path / "held_out").symlink_to(held_out.bank)
    found = verify_neighbours(tmp_path / "n", bank=made.bank, share=0)
    assert (found.held_out, found.held_out_banks) == (2, 1)
    marks = np.load(tmp_path / "n" / "held_out.npy")
    marks[np.flatnonzero(marks)[0]] = False
    np.save(tmp_path / "n" / "held_out.npy", marks)
    manifest = read_json(tmp_path / "n" / "manifest.json")
    write_manifest(tmp_path / "n", "neighbours", manifest["settings"], manifest["inputs"])
    with pytest.raises(DataError, match=r"held_out\.npy marks other documents"):
        verify_neighbours(tmp_path / "n", bank=made.bank, share=0)


def test_training_refuses_lists_into_another_store(foreign):
    with pytest.raises(DataError, match="without --queries"):
        open_sampler(foreign.folder, foreign.inputs["store"], 4)


def test_banks_of_two_encoders_are_refused(made, held_out, tmp_path):
    make_encoder(EncoderOptions((made.inputs,), str(tmp_path / "other"), replace(TINY, steps=1)))
    options = BankOptions(
        str(held_out.store), str(tmp_path / "other"), str(tmp_path / "bank"), (held_out.inputs,), workers=1
    )
    build_bank(options)
    for flags in ({"queries": str(tmp_path / "bank")}, {"held_out": (str(tmp_path / "bank"),)}):
        with pytest.raises(DataError, match="different encoders"):
            find_neighbours(made.neighbour_options(tmp_path / "n", **flags))
