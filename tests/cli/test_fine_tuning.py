"""The README's lines for those who fine-tune Chameleon or Anole, on a release of two layers in Meta's form."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.distributed import ROOT
from tests.helpers.tiny_models import TEXTS

SIZE, CODES = 9100, 8192
SHAPE = {"hidden_size": 32, "ffn_size": 48, "layers": 2, "heads": 4, "kv_heads": 2, "vocab_size": SIZE}
SMALL = [f"model.{field}={value}" for field, value in SHAPE.items()]
SMALL += ["model.sequence_length=128", "train.dtype=fp32", "train.steps=4", "train.micro_batch=2"]
SMALL += [
    "train.global_batch=4",
    "parallel.tensor=1",
    "parallel.sequence=false",
    "optimizer.schedule.warmup=1",
    "optimizer.lr=1e-2",
]
DDCONFIG = """
model:
  params:
    n_embed: 8192
    embed_dim: 4
    ddconfig: {double_z: false, z_channels: 4, resolution: 32, in_channels: 3, out_ch: 3, ch: 32, ch_mult: [1, 1, 1, 1],
               num_res_blocks: 1, attn_resolutions: [], dropout: 0.0}
"""


def write_release(folder: Path) -> None:
    """Shards, text tokenizer and image tokenizer as Meta lays them out; weights are random."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    from megacm3.tokenizers.chameleon_text import train_chameleon
    from megacm3.tokenizers.image_config import NetworkConfig
    from tests.unit.convert.test_meta import save_meta
    from tests.unit.tokenizers.test_taming import Original

    text = train_chameleon([*TEXTS, "what colour is it? red"], SIZE)
    tree = json.loads(text)
    names = tree["model"]["vocab"] | {token["content"]: token["id"] for token in tree["added_tokens"]}
    torch.manual_seed(0)
    network = {"embed_dim": 4, "num_embeddings": CODES, "latent_channels": 4, "resolution": 32, "base_channels": 32}
    config = ChameleonConfig(
        vocab_size=SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        vocabulary_map=names,
        vq_config=network | {"channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1},
    )
    ChameleonForConditionalGeneration(config).save_pretrained(folder / "hf")
    save_meta(folder / "hf", folder / "models" / "7b", 1)
    tokenizer = folder / "tokenizer"
    (tokenizer / "text_tokenizer.json").write_text(text)
    (tokenizer / "vqgan.yaml").write_text(DDCONFIG)
    image = NetworkConfig(
        image_size=32,
        channels=[32] * 4,
        layers_per_block=1,
        attention_levels=[],
        latent_channels=4,
        codebook_size=CODES,
        code_dim=4,
    )
    torch.save({"state_dict": Original(image, gumbel=False).state_dict()}, tokenizer / "vqgan.ckpt")


def write_records(folder: Path) -> Path:
    """Questions about pictures of one colour."""
    rows = []
    for number in range(16):
        colour, pixels = (("red", (255, 0, 0)), ("green", (0, 255, 0)))[number % 2]
        noise = np.random.default_rng(number).integers(0, 40, (40, 40, 3), np.uint8)
        Image.fromarray(noise + np.array(pixels, np.uint8) // 2).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "what colour is it?", "answer": colour})
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def commands() -> list[str]:
    """The section's lines, joined where they go on."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Fine-tuning Chameleon or Anole\n")[2]
    block = section.strip("\n").partition("\n\n")[0]
    return re.sub(r"\n {8,}", " ", block).strip().splitlines()


@pytest.mark.long
def test_the_lines_of_the_readme(tmp_path: Path) -> None:
    """Release in, transformers' folder out, which answers as the trainer's weights do and has moved from its start."""
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText, AutoProcessor

    write_release(tmp_path / "release")
    records = write_records(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    lines = commands()
    assert len(lines) == 4
    for line in lines:
        words = [word.replace("RELEASE", str(tmp_path / "release")) for word in shlex.split(line)]
        words = [str(records) if word == "mine.jsonl" else re.sub(r"\bruns/", f"{tmp_path}/", word) for word in words]
        if words[:2] == ["bash", "examples/pretrain.sh"]:
            words = ["python", "-m", "megacm3.train", *words[2:], *SMALL]
        words[0] = sys.executable
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        assert "could not be checked" not in done.stderr
    tuned = tmp_path / "tuned_hf"
    processor = AutoProcessor.from_pretrained(tuned)
    model, found = AutoModelForImageTextToText.from_pretrained(tuned, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    inputs = processor(images=[Image.open(tmp_path / "0.png")], text="<image>what colour is it?", return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().any()
    name = "model.layers.0.mlp.up_proj.weight"
    before, after = (load_file(folder / "model.safetensors")[name] for folder in (tmp_path / "release" / "hf", tuned))
    assert before.shape == after.shape and not torch.equal(before, after.to(before.dtype))
