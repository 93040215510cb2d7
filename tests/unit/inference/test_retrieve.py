"""Documents from a real small bank, its store and its encoder; samples ordered by its CLIP."""

import io
import shutil
import tarfile

import numpy as np
import pytest

from megacm3.errors import ConfigError, DataError
from megacm3.evaluation.pictures import png_bytes
from megacm3.inference.retrieve import Retriever, rerank
from tests.helpers.tools import run_tool

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "yellow": (230, 230, 20)}


def plain(colour, side=40, noise=0):
    rng = np.random.default_rng(noise)
    picture = np.broadcast_to(np.array(colour), (side, side, 3)) + rng.integers(-15, 16, (side, side, 3))
    return picture.clip(0, 255).astype(np.uint8)


def tokenizer_flags(folder):
    return [word for name in ("text", "image") for word in (f"--{name}-tokenizer", folder / f"{name}_tokenizer")]


@pytest.fixture(scope="module")
def place(tmp_path_factory, hf_folder):
    """bank/, store/ and encoder/ of sixteen plain pictures, made by the tools."""
    root = tmp_path_factory.mktemp("retrieve")
    with tarfile.open(root / "in.tar", "w") as tar:
        for i in range(16):
            name, colour = list(COLOURS.items())[i % 4]
            for suffix, content in (("png", png_bytes(plain(colour, noise=i))), ("txt", f"{name} thing {i}".encode())):
                info = tarfile.TarInfo(f"{i:03d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    tokenizers = tokenizer_flags(hf_folder)
    source = ("--input", root / "in.tar")
    assert run_tool("pretokenize", *source, *tokenizers, "--output", root / "store", "--workers", 1) == (0, "")
    assert run_tool("train_retriever", *source, "--output", root / "encoder", "--steps", 30, "--batch", 8) == (0, "")
    bank = ("--store", root / "store", "--encoder", root / "encoder", "--output", root / "bank", "--workers", 1)
    assert run_tool("build_memory_bank", *source, *bank) == (0, "")
    return root


def test_the_nearest_documents_come_from_the_store(place):
    retriever = Retriever.open(place / "bank")  # the store lies beside the bank, the encoder inside it
    found = retriever.documents(["red thing", "blue thing"], 2)
    assert [len(documents) for documents in found] == [2, 2]
    _, ids = retriever.bank.search(retriever.encoder.encode_texts(["red thing", "blue thing"]), 2)
    assert [[document.doc_id for document in documents] for documents in found] == ids.tolist()
    assert len(found[0][0].segments[1].tokens) == 16
    assert retriever.documents(["red thing"], 0) == [[]] and retriever.documents([], 2) == []
    with pytest.raises(ConfigError, match="--documents -1; expected 0"):
        retriever.documents(["red thing"], -1)


def test_samples_are_ordered_by_score(place):
    encoder = Retriever.open(place / "bank").encoder
    pictures = np.stack([plain(colour, noise=99) for colour in COLOURS.values()])
    order = rerank(encoder, "green thing", pictures)
    scores = encoder.encode_images(pictures) @ encoder.encode_texts(["green thing"])[0]
    assert sorted(order) == [0, 1, 2, 3] and (np.diff(scores[order]) <= 0).all()


def test_retrieved_documents_reach_the_prompt(place, generator):
    retrieved = Retriever.open(place / "bank").documents(["a red apple"], 2)
    sharp = {"temperature": 0.0, "guidance": 1}
    with_documents = generator.image_codes(["a red apple"], retrieved=retrieved, **sharp)
    assert (with_documents != generator.image_codes(["a red apple"], **sharp)).any()


def test_another_store_or_encoder_is_refused(place, tmp_path, hf_folder):
    shutil.copytree(place / "bank", tmp_path / "bank")
    with pytest.raises(ConfigError, match="--store"):
        Retriever.open(tmp_path / "bank")
    Retriever.open(tmp_path / "bank", place / "store", place / "encoder")
    words = ("--input", place / "in.tar", "--output", tmp_path / "encoder", "--steps", 1, "--batch", 8)
    assert run_tool("train_retriever", *words) == (0, "")
    with pytest.raises(DataError, match="another encoder"):
        Retriever.open(tmp_path / "bank", place / "store", tmp_path / "encoder")
    tokenizers = tokenizer_flags(hf_folder)
    words = ("--input", place / "in.tar", *tokenizers, "--output", tmp_path / "store", "--workers", 1, "--mode", "pad")
    assert run_tool("pretokenize", *words) == (0, "")
    with pytest.raises(DataError, match=r"the bank .* was made from store"):
        Retriever.open(tmp_path / "bank")
