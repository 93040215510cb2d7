"""The image tokenizer: exact codes in raster order, clear refusals, a folder that is whole or absent."""

import json

import numpy as np
import pytest
import torch

from megacm3.errors import ConfigError, DataError
from megacm3.tokenizers import image as module
from megacm3.tokenizers.image import (
    ImageTokenizer,
    load_network,
    nearest_codes,
    save_image_tokenizer,
    to_pixels,
    to_unit,
)
from megacm3.tokenizers.image_config import NetworkConfig
from megacm3.tokenizers.image_network import build_network

TINY = NetworkConfig(
    image_size=16, channels=[8, 8, 8], layers_per_block=1, latent_channels=8, codebook_size=32, code_dim=4,
    norm_groups=4, middle_attention=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = build_network(TINY).eval()
    torch.nn.init.normal_(network.quantize.embedding.weight)
    return network


@pytest.fixture(scope="module")
def tokenizer(network, tmp_path_factory):
    return save_image_tokenizer(network, 16, tmp_path_factory.mktemp("image") / "tokenizer")


@pytest.fixture(scope="module")
def pixels():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8))


def test_shapes_and_types(tokenizer, pixels):
    codes = tokenizer.encode(pixels)
    assert tokenizer.grid == (4, 4) and tokenizer.factor == 4 and tokenizer.codebook_size == 32
    assert codes.shape == (5, 16) and codes.dtype == torch.int64 and 0 <= codes.min() and codes.max() < 32
    again = tokenizer.decode(codes)
    assert again.shape == pixels.shape and again.dtype == torch.uint8
    assert torch.equal(tokenizer.encode(pixels.numpy()), codes)
    assert tokenizer.encode(pixels[:0]).shape == (0, 16)


def test_codes_are_the_network_s_own_in_raster_order(network, tokenizer, pixels):
    with torch.inference_mode():
        latents = network.encode(to_unit(pixels)).latents
        _, _, (_, _, codes) = network.quantize(latents)
        assert torch.equal(tokenizer.encode(pixels), codes.reshape(5, 16))
        entries = network.quantize.get_codebook_entry(codes, (5, 4, 4, 4))
        pictures = network.decode(entries, force_not_quantize=True).sample
    assert torch.equal(tokenizer.decode(codes.reshape(5, 16)), to_pixels(pictures))


def test_look_up_in_blocks_gives_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    latents, codebook = torch.randn(3, 4, 5, 6, generator=generator), torch.randn(50, 4, generator=generator)
    whole = nearest_codes(latents, codebook)
    flat = latents.permute(0, 2, 3, 1).reshape(-1, 1, 4)
    assert torch.equal(whole.flatten(), (flat - codebook).square().sum(-1).argmin(1))
    monkeypatch.setattr(module, "_DISTANCES", 350)
    assert torch.equal(nearest_codes(latents, codebook), whole)


def test_scaling_is_meta_s():
    ramp = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T.reshape(1, 16, 16, 3)
    unit = to_unit(ramp)
    assert unit.min() == -1 and unit.max() == 1
    assert torch.allclose(unit[0, 0].flatten(), torch.arange(256) / 255 * 2 - 1, atol=1e-6)
    assert torch.equal(to_pixels(unit), ramp)
    assert to_pixels(torch.tensor([-3.0, 3.0, 0.0]).reshape(1, 3, 1, 1)).flatten().tolist() == [0, 255, 128]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(1, 16, 16, 3), "torch.float32"),
        (torch.zeros(1, 8, 16, 3, dtype=torch.uint8), "8, 16, 3"),
        (torch.zeros(16, 16, 3, dtype=torch.uint8), "expected torch.uint8"),
    ],
)
def test_wrong_pictures_are_refused(tokenizer, bad, message):
    with pytest.raises(DataError, match=message):
        tokenizer.encode(bad)


def test_wrong_codes_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"32\.\.32 outside 0\.\.31"):
        tokenizer.decode(torch.full((1, 16), 32))
    with pytest.raises(DataError, match=r"\[n, 16\]"):
        tokenizer.decode(torch.zeros(1, 15, dtype=torch.int64))


def test_folder_round_trip_and_fingerprint(network, tokenizer, pixels, tmp_path):
    save_image_tokenizer(network, 16, tmp_path / "a")
    again = ImageTokenizer.load(tmp_path / "a")
    assert again.fingerprint == tokenizer.fingerprint
    assert torch.equal(again.encode(pixels), tokenizer.encode(pixels))
    with pytest.raises(DataError, match="exists already"):
        save_image_tokenizer(network, 16, tmp_path / "a")
    with pytest.raises(ConfigError, match="not divisible by 4"):
        save_image_tokenizer(network, 18, tmp_path / "b")


def test_damage_is_found(network, tmp_path):
    save_image_tokenizer(network, 16, tmp_path / "a")
    weights = tmp_path / "a" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        ImageTokenizer.load(tmp_path / "a")
    weights.unlink()
    with pytest.raises(DataError, match="missing"):
        ImageTokenizer.load(tmp_path / "a")
    with pytest.raises(DataError, match="does not exist"):
        ImageTokenizer.load(tmp_path / "none")


def test_weights_that_do_not_fit_are_refused(network, tmp_path):
    save_image_tokenizer(network, 16, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"layers_per_block": 2}))
    with pytest.raises(DataError, match=r"do not fit config\.json"):
        load_network(tmp_path / "a")


def test_no_gpu_is_a_clear_error(tokenizer, network):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="no GPU is visible"):
        ImageTokenizer(network, 16, "", "cuda")
    with pytest.raises(ConfigError, match="is no device"):
        ImageTokenizer(network, 16, "", "tpux")
