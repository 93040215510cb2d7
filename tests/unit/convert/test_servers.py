"""Exports in inference engines: llama.cpp's converter really run, vLLM by its registry and the fields that it reads."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.peers import llama_cpp, vllm_sources
from tests.unit.convert.conftest import build, export_with_tokenizers, exported

LLAMA_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of one of transformers' tensors."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    return f"blk.{layer[1]}.{LLAMA_NAMES[layer[2]]}.weight" if layer else LLAMA_NAMES[name]


def neighbours(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary pairs next to each other, as llama.cpp has them for Llama."""
    size = rows.shape[0] // heads
    return rows.view(heads, 2, size // 2, -1).transpose(1, 2).reshape(rows.shape)


def converted(folder: Path, output: Path) -> Any:
    """What llama.cpp's converter makes of an export, read by its own reader."""
    home = llama_cpp()
    command = [sys.executable, home / "convert_hf_to_gguf.py", folder, "--outfile", output, "--outtype", "f32"]
    ended = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    spec = importlib.util.spec_from_file_location(
        "gguf", home / "gguf-py" / "gguf" / "__init__.py", submodule_search_locations=[str(home / "gguf-py" / "gguf")]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["gguf"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GGUFReader(str(output))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_llama_cpp_converts(kind: str, tmp_path: Path) -> None:
    """Every tensor, size and piece of the export is in the GGUF file."""
    fields = {"qk_norm": "none"} if kind == "llama" else {}
    folder = export_with_tokenizers(tmp_path, "tiny_modern", **fields)
    reader = converted(folder, tmp_path / "model.gguf")
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    wanted = load_file(folder / "model.safetensors")
    assert found.keys() - {"rope_freqs.weight"} == {gguf_name(name) for name in wanted}
    for name, value in wanted.items():
        if kind == "llama" and re.search("[qk]_proj", name):
            value = neighbours(value, 4 if "q_proj" in name else 2)
        assert torch.equal(found[gguf_name(name)], value), name
    settings = {key: field.contents() for key, field in reader.fields.items()}
    sizes = {"context_length": 64, "embedding_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2}
    for key, size in sizes.items():
        assert settings[f"{kind}.{key}"] == size, key
    pieces = settings["tokenizer.ggml.tokens"]
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(folder / "text_tokenizer" / "text.model"))
    assert len(pieces) == 512 and pieces[:320] == [model.id_to_piece(i) for i in range(320)]
    assert settings["tokenizer.ggml.scores"][300] == pytest.approx(model.get_score(300))
    # Special tokens by their names; image ids have none there, so that no text becomes one.
    assert pieces[353] == "</s>" and settings["tokenizer.ggml.bos_token_id"] == 353
    assert settings["tokenizer.ggml.token_type"][353] == 3 and settings["tokenizer.ggml.token_type"][325] == 5
    if kind == "llama":
        assert settings["tokenizer.ggml.add_space_prefix"] is False


VLLM = {
    "opt": {
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "activation_function": "relu",
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama": {"attention_bias": False, "mlp_bias": False, "head_dim": 8, "hidden_act": "silu", "rms_norm_eps": 1e-6},
    "qwen3": {"attention_bias": False, "head_dim": 8, "hidden_act": "silu", "rms_norm_eps": 1e-6},
}
"""Fields that vLLM 0.33's classes read, and what they must be for the class to be our model."""
SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 96}


@pytest.mark.parametrize("kind", VLLM)
def test_vllm_finds_the_fields_that_it_reads(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    build(kind).save_pretrained(tmp_path / "first")  # type: ignore[operator]
    config = AutoConfig.from_pretrained(exported(tmp_path / "first", tmp_path))
    wanted = VLLM[kind] | SHAPE | {"vocab_size": 300} | ({} if kind == "opt" else {"num_key_value_heads": 2})
    assert {key: getattr(config, key) for key in wanted} == wanted
    if kind != "opt":
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.long
@pytest.mark.parametrize("kind", VLLM)
def test_vllm_has_the_class(kind: str, tmp_path: Path) -> None:
    models = vllm_sources() / "model_executor" / "models"
    name = {"opt": "OPT", "llama": "Llama", "qwen3": "Qwen3"}[kind] + "ForCausalLM"
    registry = (models / "registry.py").read_text(encoding="utf-8")
    assert f'"{name}": ("{kind}", "{name}")' in registry
    source = (models / f"{kind}.py").read_text(encoding="utf-8")
    read = set(re.findall(r"config\.(\w+)", source)) | set(re.findall(r'config,\s*"(\w+)"', source))
    assert VLLM[kind].keys() <= read, VLLM[kind].keys() - read
