"""Exports of Chameleon runs: image tokenizer inside, the causal twin beside."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megacm3.convert.to_hf import Export, to_hf
from megacm3.convert.twin import register
from megacm3.convert.verify import compare
from megacm3.convert.vq import VqModel
from megacm3.tokenizers.vocabulary import Vocabulary
from tests.helpers.checkpoints import tiny, with_vocabulary, write_random
from tests.unit.convert.conftest import build, import_hf, tensors

Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def image_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tokenizer of the shape that Chameleon's class can hold: 32 pixels, 8 x 8 codes of 64."""
    from diffusers import VQModel

    from megacm3.tokenizers.image import save_image_tokenizer

    torch.manual_seed(0)
    network = VQModel(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 32, 64),
        layers_per_block=2,
        latent_channels=8,
        vq_embed_dim=4,
        num_vq_embeddings=64,
        norm_num_groups=32,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("tokenizers") / "image_tokenizer"
    save_image_tokenizer(network, 32, folder)
    return folder


def test_a_trained_run_exports_with_its_image_tokenizer(image_tokenizer: Path, tmp_path: Path) -> None:
    """The codes of transformers' encoder are our tokenizer's, and ids and placeholders go by the same table."""
    from transformers import ChameleonForConditionalGeneration

    from megacm3.tokenizers.image import ImageTokenizer, to_unit

    vocabulary = Vocabulary.chameleon(700, 64, 64)
    config = tiny("tiny_chameleon_34b", vocab_size=700)
    native = tmp_path / "native"
    write_random(config, native)
    with_vocabulary(native, vocabulary)
    export = Export.of(native, "float32", {"image_tokenizer": str(image_tokenizer)})
    output = to_hf(export, tmp_path / "hf", gate=lambda f: _gate(export, f))
    model, info = ChameleonForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    codes = ImageTokenizer.load(image_tokenizer).encode(pixels)
    with torch.no_grad():
        ids = model.model.get_image_tokens(to_unit(pixels))
    assert len(codes.unique()) > 8
    assert torch.equal(ids, torch.from_numpy(vocabulary.image_ids(codes.numpy())))
    sidecar = json.loads((output / "megacm3.json").read_text())
    assert sidecar["image_size"] == 32 and sidecar["grid"] == [8, 8] and (output / "image_tokenizer").is_dir()


def _gate(export: Export, folder: Path) -> None:
    assert compare(export.checkpoint, export.config, folder, kind=export.source_kind, dtype=export.dtype).largest < 1e-5


def test_without_a_fitting_tokenizer_pictures_go_as_ids(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    native = tmp_path / "native"
    write_random(tiny("tiny_chameleon_7b", vocab_size=700), native)
    with_vocabulary(native, Vocabulary.chameleon(700, 64, 64))
    export = Export.of(native)
    assert "its vqmodel is blank: the run has no image tokenizer" in caplog.text
    to_hf(export, tmp_path / "hf", gate=lambda f: _gate(export, f))
    blank = {name: value for name, value in tensors(tmp_path / "hf").items() if "vqmodel" in name}
    assert blank and all(not value.any() for value in blank.values())


def test_tokenizers_that_the_class_cannot_hold(tmp_path: Path) -> None:
    from tests.helpers.tiny_models import save_tokenizers

    save_tokenizers(tmp_path, 320)
    assert VqModel.of(tmp_path / "image_tokenizer") == "its norms have 4 groups; ChameleonVQVAE has 32"


@pytest.mark.parametrize("kind", ["chameleon", "swin"])
def test_the_twin_shows_all_logits_and_can_be_fine_tuned(kind: str, folders: Folders, tmp_path: Path) -> None:
    output = to_hf(Export.of(import_hf(folders(kind), tmp_path / "native")), tmp_path / "hf", shard_bytes=50_000)
    original = build(kind)
    twin, info = register().from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not hasattr(twin.model, "vqmodel")
    ids = torch.randint(0, 700, (2, 24), generator=torch.Generator().manual_seed(0))
    ids[:, 5:21] = torch.arange(4, 20)  # image ids
    with torch.no_grad():
        masked, shown = original(input_ids=ids).logits, twin(input_ids=ids).logits
    hidden = masked == torch.finfo(masked.dtype).min
    assert hidden.any() and torch.equal(masked[~hidden], shown[~hidden]) and shown[hidden].abs().max() < 100
    # Image labels give transformers' own class an infinite loss.
    assert torch.isinf(original(input_ids=ids, labels=ids).loss)
    loss = twin(input_ids=ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss) and twin.lm_head.weight.grad[4:20].abs().sum() > 0
    cached = twin.generate(ids[:1], max_new_tokens=6, do_sample=False)
    full = twin.generate(ids[:1], max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, full)
    assert twin.supports_tp_plan and twin._tp_plan["model.layers.*.mlp.up_proj"] == "colwise"


ELSEWHERE = """
import sys, torch
sys.modules["megacm3"] = None  # as if it were not installed
from transformers import AutoModel, AutoModelForCausalLM
folder = sys.argv[1]
model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
bare = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(bare).__name__ == "MegaCM3Model" and type(AutoModel.from_pretrained(folder)).__name__ == "ChameleonModel"
# What vLLM's backend for transformers' models asks of a class.
assert model.is_backend_compatible() and model.supports_pp_plan and bare.tp_plan["layers.*.mlp.up_proj"] == "colwise"
images = list(range(4, 36))
ids = torch.tensor([[600, 601, 602]])
said = model.generate(ids, max_new_tokens=16, do_sample=True, prefix_allowed_tokens_fn=lambda batch, sent: images)
assert said.shape == (1, 19) and set(said[0, 3:].tolist()) <= set(images)
torch.save(model(input_ids=ids).logits, sys.argv[2])
"""


@pytest.mark.long
def test_the_twin_is_remote_code_where_megacm3_is_not_installed(folders: Folders, tmp_path: Path) -> None:
    output = to_hf(Export.of(import_hf(folders("chameleon"), tmp_path / "native")), tmp_path / "hf")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", ELSEWHERE, str(output), str(tmp_path / "logits.pt")]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    with torch.no_grad():
        ours = register().from_pretrained(output)(input_ids=torch.tensor([[600, 601, 602]])).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), ours)
