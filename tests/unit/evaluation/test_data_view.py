"""The page of a store: what is on it, and that captions cannot break it."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from megacm3.data.documents import ANSWER, IMAGE, TEXT
from megacm3.data.parts import write_store
from megacm3.data.store import StoreShape
from megacm3.tokenizers.image import ImageTokenizer, save_image_tokenizer
from megacm3.tokenizers.text import TextTokenizer, train_text_tokenizer
from tests.helpers.tools import run_tool

CAPTIONS = ["a red apple", "<script>alert(1)</script>", "</s> & <break>"] + [f"thing number {i}" for i in range(20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import VQModel

    root = tmp_path_factory.mktemp("view")
    text = train_text_tokenizer(CAPTIONS, 400, root / "text_tokenizer")
    torch.manual_seed(0)
    network = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=32,
        norm_num_groups=4,
        vq_embed_dim=4,
    )
    image = save_image_tokenizer(network, 16, root / "image_tokenizer")
    write(root / "store", text, image)
    return root


def write(folder: Path, text: TextTokenizer, image: ImageTokenizer) -> None:
    rng = np.random.default_rng(0)

    def documents():
        for i, caption in enumerate(CAPTIONS):
            segments = [(TEXT, np.array(text.encode(caption))), (IMAGE, rng.integers(0, 32, 16))]
            yield segments if i % 4 else segments[:1], {"key": str(i), "caption": caption}

    inputs = {"text_tokenizer": text.fingerprint, "image_tokenizer": image.fingerprint}
    write_store(folder, documents(), StoreShape(400, 32, 16, 16), inputs)


def page(folder: Path, tmp_path: Path, *arguments: str) -> str:
    code, error = run_tool("view_data", folder / "store", "--output", tmp_path / "view.html", *arguments)
    assert (code, error) == (0, "")
    return (tmp_path / "view.html").read_text(encoding="utf-8")


def test_page_shows_documents_sequences_and_statistics(folder: Path, tmp_path: Path) -> None:
    html = page(folder, tmp_path, "--documents", "23", "--sequences", "12")
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", html)
    assert html.count("<img") > 20
    for part in ("a red apple", "thing number 7", "sentinel 0", "&lt;eoss&gt;", "documents: text image", "padding"):
        assert part in html
    assert "<script>" not in html and "&lt;script&gt;alert(1)" in html


@pytest.mark.parametrize(
    "overrides",
    [("data.packing=blocks", "objective.spans=3"), ("data.document_mask=true",), ("objective.kind=causal",)],
)
def test_page_of_other_settings(folder: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    html = page(folder, tmp_path, *overrides)
    assert "Sequences" in html
    assert ("sentinel 0" in html) == ("objective.kind=causal" not in overrides)


@pytest.mark.parametrize(
    "overrides",
    [("objective.spans=2",), ("data.document_mask=true",), ("objective.kind=causal", "objective.loss_on=answers")],
)
def test_answers_are_marked(folder: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    text = TextTokenizer.load(folder / "text_tokenizer")
    inputs = {"text_tokenizer": text.fingerprint, "image_tokenizer": ""}
    inputs["image_tokenizer"] = ImageTokenizer.load(folder / "image_tokenizer").fingerprint
    rng = np.random.default_rng(0)
    asked, answer, drawn = (np.array(text.encode(words)) for words in ("What is it?", "zebra", "thing"))
    documents = [[(TEXT, asked), (TEXT | ANSWER, answer), (IMAGE, rng.integers(0, 32, 16))] for _ in range(12)]
    documents += [[(TEXT, drawn), (IMAGE | ANSWER, rng.integers(0, 32, 16))] for _ in range(12)]
    write_store(tmp_path / "store", ((segments, {}) for segments in documents), StoreShape(400, 32, 16, 16), inputs)
    tokenizers = [f"--{name.replace('_', '-')}={folder / name}" for name in ("text_tokenizer", "image_tokenizer")]
    html = page(tmp_path, tmp_path, *tokenizers, *overrides)
    found = re.findall(r'<span class="t( a)?">([^<]*)</span>', html)
    assert {words for mark, words in found if mark} == {"zebra"}
    assert {words for mark, words in found if not mark} >= {"What is it?", "thing"}
    assert "zebra" not in {words for mark, words in found if not mark}
    # A picture is an answer where it was drawn for a text, and is none beside a question.
    assert 'class="i a"' in html and 'class="i"' in html
    assert "answer: zebra" in html and "text text(answer) image" in html


def test_page_without_tokenizers_shows_numbers(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    (folder / "store").rename(tmp_path / "alone" / "store")
    try:
        html = page(tmp_path / "alone", tmp_path)
    finally:
        (tmp_path / "alone" / "store").rename(folder / "store")
    assert "of 16 codes" in html and "a red apple" not in html


def test_page_with_a_config(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {preset: tiny_cm3leon, vocab_size: 600}\ndata: {packing: whole}\n")
    assert "64 tokens a sequence" in page(folder, tmp_path, "--config", str(tmp_path / "run.yaml"))


def test_wrong_flags_are_refused_with_one_line(folder: Path, tmp_path: Path) -> None:
    store, output = folder / "store", ("--output", tmp_path / "no.html")
    for arguments, code, message in (
        ((folder / "nowhere", *output), 3, "does not exist"),
        ((store, "--output", tmp_path / "no.png"), 2, "ends in .html"),
        ((store, *output, "--documents", -1), 2, "--documents -1"),
        ((store, *output, "data.paking=whole"), 2, "did you mean 'data.packing'"),
        ((store, *output, "--text-tokenizer", folder / "image_tokenizer"), 3, "expected 'text_tokenizer'"),
        ((store, *output, "--neighbours", folder / "nowhere"), 3, "does not exist"),
    ):
        found, error = run_tool("view_data", *arguments)
        assert found == code and message in error, error
    assert not (tmp_path / "no.html").exists()


def test_a_tokenizer_of_another_store_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "text_tokenizer"
    train_text_tokenizer(["quite other texts"] * 3, 400, other)
    code, error = run_tool("view_data", folder / "store", "--text-tokenizer", other, "--output", tmp_path / "no.html")
    assert code == 3 and "--text-tokenizer" in error and "was made with" in error
