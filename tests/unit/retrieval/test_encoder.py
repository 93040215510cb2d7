"""The encoder: unit vectors from a complete CLIP folder, and every folder that is none refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor

from megacm3.errors import ConfigError, DataError
from megacm3.retrieval.encoder import Encoder, document_vectors, encoder_fingerprint, normalise
from megacm3.retrieval.train_encoder import copy_encoder
from tests.unit.retrieval.conftest import flip


@pytest.fixture(scope="module")
def encoder(made) -> Encoder:
    return Encoder.load(made.encoder)


def pixels(count: int = 5, size: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_vectors_are_what_clip_itself_gives_in_the_common_space(made, encoder):
    # transformers 5 gives an object where a tensor is expected, and its vectors are not normalised.
    model = CLIPModel.from_pretrained(made.encoder).eval()
    processor = CLIPProcessor.from_pretrained(made.encoder)
    texts = ["a red square", "a blue bar on white and more"]
    pictures = [Image.fromarray(array) for array in pixels(2)]
    with torch.inference_mode():
        expected = model(**processor(text=texts, images=pictures, return_tensors="pt", padding=True))
    image, text = encoder.encode_images(pictures), encoder.encode_texts(texts)
    for found, wanted in ((image, expected.image_embeds), (text, expected.text_embeds)):
        assert found.shape == (2, encoder.dim) and found.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def test_the_folder_is_a_complete_one_of_transformers(made):
    tokenizer = AutoTokenizer.from_pretrained(made.encoder)
    assert type(tokenizer).__name__ == "CLIPTokenizer"
    assert tokenizer.decode(tokenizer("a Red square").input_ids, skip_special_tokens=True) == "a red square"
    assert json.loads((made.encoder / "config.json").read_text())["architectures"] == ["CLIPModel"]


def test_batches_change_nothing(encoder):
    texts = [f"a {word} square" * n for n, word in enumerate(("red", "green", "blue", "grey"), 1)]
    np.testing.assert_allclose(encoder.encode_texts(texts, 1), encoder.encode_texts(texts, 4), atol=1e-6)
    np.testing.assert_allclose(encoder.encode_images(pixels(), 2), encoder.encode_images(pixels(), 5), atol=1e-6)
    assert encoder.encode_texts([]).shape == encoder.encode_images([]).shape == (0, encoder.dim)


def test_pictures_of_any_mode_and_size_stand_on_white(encoder):
    rgb = Image.fromarray(pixels(1)[0])
    transparent = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    white = Image.new("RGB", (16, 16), "white")
    found = encoder.encode_images([rgb, transparent, white, rgb.convert("L"), Image.new("P", (40, 20))])
    np.testing.assert_array_equal(found[1], found[2])
    np.testing.assert_allclose(found[0], encoder.encode_images(pixels(1))[0], atol=1e-6)


def test_no_text_becomes_a_special_token_or_is_unknown(encoder):
    begin, end = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    texts = ["<|endoftext|> <|startoftext|>", "日本語 emoji 🙂 ñ é", "\x00\x07", "q" * 500, "", "ﬁ ½"]
    for row in encoder.tokenize(texts):
        assert begin not in row and end not in row and len(row) <= encoder.max_tokens
    assert np.isfinite(encoder.encode_texts(texts)).all()


def test_document_vectors_are_the_mean_of_unit_halves():
    image, text = np.float32([[3, 0], [0, 2]]), np.float32([[0, 5], [0, 1]])
    half = np.sqrt(0.5)
    np.testing.assert_allclose(document_vectors(image, text), [[half, half], [0, 1]], atol=1e-6)


@pytest.mark.parametrize("bad", [[np.nan, 1], [np.inf, 1], [0, 0]])
def test_vectors_without_a_direction_are_refused(bad):
    with pytest.raises(DataError, match="row 1"):
        normalise(np.array([[1, 0], bad], np.float32))


def test_a_moved_folder_is_the_same_encoder(made, copy):
    assert encoder_fingerprint(copy(made.encoder)) == encoder_fingerprint(made.encoder)


def test_a_folder_without_a_manifest_is_known_by_its_files(made, copy, encoder):
    folder = copy(made.encoder)
    (folder / "manifest.json").unlink()
    first = Encoder.load(folder)
    np.testing.assert_array_equal(first.encode_texts(["a bar"]), encoder.encode_texts(["a bar"]))
    # What a download holds beside, for other frameworks, is neither read nor copied.
    (folder / "pytorch_model.bin").write_bytes(b"pickles")
    assert encoder_fingerprint(folder) == first.fingerprint
    copy_encoder(folder, folder.parent / "copied")
    assert encoder_fingerprint(folder.parent / "copied") == first.fingerprint
    assert not (folder.parent / "copied" / "pytorch_model.bin").exists()
    flip(folder / "model.safetensors")
    assert first.fingerprint != encoder_fingerprint(folder)


def test_folders_that_are_no_clip_are_refused(made, copy, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        Encoder.load(tmp_path / "nothing")
    folder = copy(made.encoder)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json"):
        shutil.move(folder / name, tmp_path / name)
        with pytest.raises(DataError, match=name):
            Encoder.load(folder)
        shutil.move(tmp_path / name, folder / name)
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(DataError, match="'bert'; expected 'clip'"):
        Encoder.load(folder)


def test_damaged_or_incomplete_weights_are_refused(made, copy):
    folder = copy(made.encoder)
    flip(folder / "model.safetensors")
    with pytest.raises(DataError, match="damaged"):
        Encoder.load(folder)
    (folder / "manifest.json").unlink()
    weights = load_file(made.encoder / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # transformers would go on with random weights in its place.
    with pytest.raises(DataError, match=r"lack 1 tensors.*visual_projection"):
        Encoder.load(folder)
    (folder / "model.safetensors").write_bytes((made.encoder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(DataError, match="not a readable CLIP folder"):
        Encoder.load(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused(made):
    with pytest.raises(ConfigError, match="--device cpu"):
        Encoder.load(made.encoder, "cuda")
