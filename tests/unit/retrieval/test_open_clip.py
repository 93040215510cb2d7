"""Encoders from folders of open_clip: a tiny one with random weights, against open_clip's own pipeline."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from PIL import Image

from megacm3.errors import ConfigError, DataError
from megacm3.retrieval.bank import MemoryBank
from megacm3.retrieval.build_bank import build_bank
from megacm3.retrieval.encoder import Encoder, encoder_fingerprint, encoder_width

WIDTH = 32
CONFIG = {
    "model_cfg": {
        "embed_dim": WIDTH,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.27]},
}


@pytest.fixture(scope="module")
def open_clip():
    """The package, made to load beside a torch for the CPU, too.

    The torchvision of the package index is built for CUDA: beside a CPU torch its compiled operators do not load, and
    its import ends at two names that it cannot find. open_clip needs its transforms alone, which are Python: the names
    suffice.
    """
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip: pip install -e '.[open_clip]'")
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    import open_clip

    yield open_clip
    # Until here, since the names go with it.
    del library


@pytest.fixture(scope="module")
def folder(open_clip, tmp_path_factory):
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(**CONFIG["model_cfg"])
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def test_vectors_are_those_of_open_clip(folder, open_clip):
    import torch

    encoder = Encoder.load(folder)
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    texts = [
        "a red apple",
        "an upside down house with many, many words in its caption, more than the model reads at all",
    ]
    pictures = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (40, 50, 3), np.uint8)) for n in range(3)]
    with torch.inference_mode():
        text = model.eval().encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(texts), normalize=True)
        image = model.encode_image(torch.stack([transform(picture) for picture in pictures]), normalize=True)
    np.testing.assert_allclose(encoder.encode_texts(texts), text.numpy(), atol=1e-5)
    np.testing.assert_allclose(encoder.encode_images(pictures), image.numpy(), atol=1e-5)
    assert encoder.dim == encoder_width(folder) == WIDTH
    assert encoder.image_size == 32
    assert encoder.fingerprint == encoder_fingerprint(folder)


def test_marks_in_a_caption_are_text(folder):
    encoder = Encoder.load(folder)
    assert encoder.tokenize(["apple <end_of_text> pear"]) == encoder.tokenize(["apple  pear"])


def test_a_bank_is_built_with_it(folder, made, tmp_path):
    build_bank(made.bank_options(tmp_path / "bank", encoder=str(folder)))
    bank = MemoryBank.open(tmp_path / "bank")
    query = bank.encoder().encode_texts(["a red square on white"])
    assert bank.search(query, 3)[1].min() >= 0
    with pytest.raises(DataError, match="another encoder"):
        bank.check_encoder(Encoder.load(made.encoder))


def test_other_weights_are_another_encoder_and_damage_is_refused(folder, tmp_path):
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    weights = tmp_path / "open_clip_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert encoder_fingerprint(tmp_path) != encoder_fingerprint(folder)
    weights.write_bytes(bytes(data[:-100]))
    with pytest.raises(DataError, match="not a readable open_clip folder"):
        Encoder.load(tmp_path)
    weights.unlink()
    with pytest.raises(DataError, match=r"lacks open_clip_model\.safetensors"):
        Encoder.load(tmp_path)


def write_config(folder, **text) -> None:
    config = {"model_cfg": CONFIG["model_cfg"] | {"text_cfg": CONFIG["model_cfg"]["text_cfg"] | text}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "open_clip_model.safetensors").write_bytes(b"")


def test_a_tokenizer_from_elsewhere_is_refused(open_clip, tmp_path):
    write_config(tmp_path, hf_tokenizer_name="somewhere/else")
    with pytest.raises(DataError, match="own tokenizer"):
        Encoder.load(tmp_path)


def test_a_torchvision_that_does_not_fit_torch_is_named(tmp_path, monkeypatch):
    write_config(tmp_path)
    (tmp_path / "modules" / "open_clip").mkdir(parents=True)
    fault = "operator torchvision::nms does not exist"
    (tmp_path / "modules" / "open_clip" / "__init__.py").write_text(f"raise RuntimeError({fault!r})")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    with pytest.raises(ConfigError, match=r"nms does not exist.*torchvision"):
        Encoder.load(tmp_path)


def test_without_open_clip_it_is_named(tmp_path, monkeypatch):
    write_config(tmp_path)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[open_clip\]'"):
        Encoder.load(tmp_path)
