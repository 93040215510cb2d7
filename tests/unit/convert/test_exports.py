"""Whole exports as users meet them: every file there, and transformers' own front doors open."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megacm3.convert.to_hf import Export, to_hf
from megacm3.tokenizers.image import ImageTokenizer
from megacm3.tokenizers.vocabulary import Vocabulary, image_name
from tests.helpers.checkpoints import tiny, with_vocabulary, write_random
from tests.helpers.tiny_models import TEXTS
from tests.unit.convert.conftest import export_with_tokenizers

FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "image_tokenizer/config.json",
    "image_tokenizer/diffusion_pytorch_model.safetensors",
    "image_tokenizer/manifest.json",
    "megacm3.json",
    "model.safetensors",
    "text_tokenizer/manifest.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
SENTENCEPIECE = {"text_tokenizer/text.model", "tokenizer.model"}
CHAMELEON = {"modeling_megacm3.py", "preprocessor_config.json", "processor_config.json"}
FAMILIES = {
    "OPTForCausalLM": ("tiny_cm3leon", {}),
    "Qwen3ForCausalLM": ("tiny_modern", {}),
    "LlamaForCausalLM": ("tiny_modern", {"qk_norm": "none"}),
}


def files_of(folder: Path) -> set[str]:
    """Relative paths of all files."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_decoder(folder: Path) -> None:
    """The image tokenizer of an export has both halves."""
    from safetensors import safe_open

    with safe_open(folder / "image_tokenizer" / "diffusion_pytorch_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {name.split(".")[0] for name in names} >= {"encoder", "decoder", "quantize", "post_quant_conv"}


@pytest.mark.parametrize("hf_class", FAMILIES)
def test_a_whole_export(hf_class: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    preset, fields = FAMILIES[hf_class]
    folder = export_with_tokenizers(tmp_path, preset, **fields)
    assert files_of(folder) == FILES | SENTENCEPIECE
    assert_decoder(folder)
    card = (folder / "README.md").read_text()
    sidecar = json.loads((folder / "megacm3.json").read_text())
    table = Vocabulary.from_json(sidecar["vocabulary"])
    for told in (hf_class, "## Training configuration", f"preset: {preset}", sidecar["source"]["checkpoint"]):
        assert told in card
    assert {"text_tokenizer", "image_tokenizer"} <= sidecar["source"].keys() and sidecar["grid"] == [4, 4]
    names = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert [names[image_name(code)] for code in range(32)] == table.code_to_id.tolist()

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == hf_class and not info["missing_keys"] and not info["unexpected_keys"]
    said = pipeline("text-generation", model=str(folder))("a red", max_new_tokens=3, do_sample=False)
    assert said[0]["generated_text"].startswith("a red")
    # A picture: image ids alone may come, and the folder's own tokenizer makes pixels of them.
    allowed = table.code_to_id.tolist()
    prompt = AutoTokenizer.from_pretrained(folder)("a red apple<break>", return_tensors="pt")
    assert prompt["input_ids"][0, -1] == table.break_
    ids = model.generate(**prompt, max_new_tokens=16, do_sample=True, prefix_allowed_tokens_fn=lambda *_: allowed)
    codes = table.codes(ids[:, -16:].numpy())
    pixels = ImageTokenizer.load(folder / "image_tokenizer").decode(codes)
    assert (codes >= 0).all() and np.asarray(pixels).shape == (1, 32, 32, 3)


def test_plain_readers_of_safetensors(tmp_path: Path) -> None:
    """Without torch, by slices, and into a model: the file is what the format says."""
    from safetensors import safe_open
    from safetensors.numpy import load_file
    from safetensors.torch import load_model
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = export_with_tokenizers(tmp_path, "tiny_modern")
    values = load_file(folder / "model.safetensors")
    reference = AutoModelForCausalLM.from_pretrained(folder)
    state = reference.state_dict()
    assert values.keys() == state.keys()
    assert all(np.array_equal(value, state[name].numpy()) for name, value in values.items())
    with safe_open(folder / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        rows = file.get_slice("model.embed_tokens.weight")[5:9]
    assert np.array_equal(rows, values["model.embed_tokens.weight"][5:9])
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert load_model(model, folder / "model.safetensors") == (set(), [])
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, reference(input_ids=ids).logits)


def test_a_whole_chameleon_export(tmp_path: Path) -> None:
    """Processor, pictures as pixels, and the twin's file: what a prompt with a picture needs is in the one folder."""
    from diffusers import VQModel
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from megacm3.tokenizers import chameleon_text
    from megacm3.tokenizers.image import save_image_tokenizer
    from megacm3.tokenizers.text import save_chameleon

    text = chameleon_text.train_chameleon([*TEXTS, "how many apples? 12"], 9100)
    ours = save_chameleon(text, 9100, tmp_path / "text_tokenizer", settings={}, inputs={}, overwrite=False)
    torch.manual_seed(0)
    network = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=8192,
        norm_num_groups=32,
    )
    save_image_tokenizer(network, 32, tmp_path / "image_tokenizer")
    table = ours.vocabulary(8192, 64)
    write_random(tiny("tiny_chameleon_7b", vocab_size=9100), tmp_path / "native")
    with_vocabulary(tmp_path / "native", table)
    folders = {role: str(tmp_path / role) for role in ("text_tokenizer", "image_tokenizer")}
    folder = to_hf(Export.of(tmp_path / "native", "float32", folders), tmp_path / "hf", shard_bytes=1_000_000)
    found = files_of(folder)
    shards = {name for name in found if name.startswith("model-")}
    assert len(shards) > 1 and "text_tokenizer/tokenizer.json" in found
    assert found - shards - {"text_tokenizer/tokenizer.json"} == (
        FILES - {"model.safetensors"} | CHAMELEON | {"model.safetensors.index.json"}
    )
    assert_decoder(folder)
    processor = AutoProcessor.from_pretrained(folder)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    inputs = processor(images=[picture], text="what is <image>?", return_tensors="pt")
    codes = ImageTokenizer.load(folder / "image_tokenizer").encode(np.array(picture)[None])
    ids = inputs["input_ids"].clone()
    ids[ids == dict(table.special)["<image>"]] = torch.from_numpy(table.image_ids(np.asarray(codes))).flatten()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(input_ids=ids).logits)
