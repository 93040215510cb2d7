"""`config.json` of the Hugging Face classes, from our model config and back."""

import itertools
from typing import Any

from megacm3.config import ModelConfig
from megacm3.convert.tokenizer import RELEASED
from megacm3.errors import CheckpointError
from megacm3.tokenizers.vocabulary import Vocabulary, image_name

CLASSES = {
    "opt": "OPTForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "chameleon": "ChameleonForConditionalGeneration",
}
"""Kind of export -> class in transformers."""

SIDECAR = "megacm3.json"
"""File beside the weights with what transformers has no place for: the table of ids, the grid, fingerprints."""


def special_ids(vocabulary: Vocabulary | None) -> dict[str, int | None]:
    """bos, eos and pad for config.json and generation_config.json; all None without a vocabulary."""
    if vocabulary is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {"bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.eos, "pad_token_id": vocabulary.pad}


def to_hf_config(kind: str, model: ModelConfig, ids: dict[str, int | None], dtype: str) -> dict[str, Any]:
    """The fields of config.json that say what the model is; `chameleon` needs `chameleon_fields` besides."""
    common = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "max_position_embeddings": model.sequence_length,
        "tie_word_embeddings": model.tied,
        "use_cache": True,
        **ids,
    }
    if kind == "opt":
        return common | {
            "ffn_dim": model.ffn_size,
            "word_embed_proj_dim": model.hidden_size,
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "dropout": model.dropout,
            "attention_dropout": 0.0,
            "layerdrop": 0.0,
            "init_std": model.init_std,
        }
    llama = common | {
        "intermediate_size": model.ffn_size,
        "num_key_value_heads": model.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
    }
    if kind == "llama":
        return llama | {"head_dim": model.hidden_size // model.heads, "mlp_bias": False}
    if kind == "qwen3":
        return llama | {"head_dim": model.hidden_size // model.heads, "use_sliding_window": False}
    return llama | {"mlp_bias": False, "swin_norm": model.norm_order == "swin", "model_parallel_size": 1}


def vocabulary_map(vocabulary: Vocabulary) -> dict[str, int]:
    """Name -> id of the image codes and special tokens, in the released spelling, for ChameleonConfig."""
    special = {RELEASED.get(name, name): i for name, i in vocabulary.special}
    return special | {image_name(code): int(i) for code, i in enumerate(vocabulary.code_to_id)}


def check_image_map(vocabulary: Vocabulary, where: str) -> None:
    """Raise CheckpointError where ids do not rise with the image codes.

    Chameleon's class in transformers sorts codes and ids apart before it pairs them, so that it would take such a
    table's pictures for others.
    """
    ids = vocabulary.code_to_id.tolist()
    for code, (before, after) in enumerate(itertools.pairwise(ids)):
        if after <= before:
            first, second = image_name(code), image_name(code + 1)
            raise CheckpointError(
                f"{where}: {first} has id {before} and {second} has {after}; transformers' Chameleon pairs codes with "
                "ids in rising order, so that its pictures would be wrong; expected ids that rise with the codes"
            )


def from_hf_config(tree: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """(kind, fields of ModelConfig) from a config.json; qk_norm_groups is left to the tensors.

    Raises CheckpointError for a class that the table lacks or a setting that our layers do not have.
    """
    kind = str(tree.get("model_type"))
    if kind not in CLASSES:
        raise CheckpointError(f"{where}: model_type is '{kind}'; expected one of {', '.join(CLASSES)}")
    try:
        return kind, (_from_opt(tree, where) if kind == "opt" else _from_llama(kind, tree, where))
    except KeyError as fault:
        raise CheckpointError(f"{where} lacks the key {fault}") from fault


def _require(tree: dict[str, Any], required: dict[str, Any], where: str) -> None:
    for key, value in required.items():
        if tree.get(key, value) not in (value, None):
            raise CheckpointError(f"{where}: {key} is {tree[key]!r}; these layers have only {value!r}")


def _common(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": tree["vocab_size"],
        "hidden_size": tree["hidden_size"],
        "layers": tree["num_hidden_layers"],
        "heads": tree["num_attention_heads"],
        "sequence_length": tree["max_position_embeddings"],
        "dropout": 0.0,
        "init_std": tree.get("init_std", tree.get("initializer_range", 0.02)),
    }


def _from_opt(tree: dict[str, Any], where: str) -> dict[str, Any]:
    required = {
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "word_embed_proj_dim": tree["hidden_size"],
        "activation_function": "relu",
    }
    # A key left out has transformers' default, which for these two is not CM3Leon's.
    _require({"enable_bias": True, "layer_norm_elementwise_affine": True} | tree, required, where)
    return _common(tree) | {
        "family": "cm3leon",
        "kv_heads": tree["num_attention_heads"],
        "ffn_size": tree["ffn_dim"],
        "norm": "layernorm",
        "norm_eps": 1e-5,  # torch's default, which OPT's layers use
        "norm_order": "pre",
        "activation": "relu",
        "positions": "learned",
        "qk_norm": "none",
        "tied": bool(tree.get("tie_word_embeddings", True)),
    }


def _from_llama(kind: str, tree: dict[str, Any], where: str) -> dict[str, Any]:
    rope = tree.get("rope_parameters") or {"rope_theta": tree.get("rope_theta", 10000.0)}
    size = tree["hidden_size"] // tree["num_attention_heads"]
    if kind == "qwen3":
        tree = {"head_dim": 128} | tree  # transformers' default
    required = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "use_sliding_window": False}
    _require(tree, required | {"head_dim": size, "rope_scaling": None}, where)
    _require(rope, {"rope_type": "default"}, where)
    if kind == "chameleon" and tree.get("rms_norm_eps", 1e-5) != 1e-5:
        raise CheckpointError(
            f"{where}: rms_norm_eps is {tree['rms_norm_eps']}; its q/k norms use 1e-5, and ours use one"
        )
    kv_heads = tree.get("num_key_value_heads") or tree["num_attention_heads"]
    if tree["num_attention_heads"] % kv_heads:
        raise CheckpointError(
            f"{where}: num_attention_heads is {tree['num_attention_heads']}, "
            f"which is no multiple of num_key_value_heads {kv_heads}"
        )
    return _common(tree) | {
        "family": "chameleon" if kind == "chameleon" else "modern",
        "kv_heads": kv_heads,
        "ffn_size": tree["intermediate_size"],
        "norm": "rmsnorm",
        "norm_eps": tree.get("rms_norm_eps", 1e-5 if kind == "chameleon" else 1e-6),
        "norm_order": "swin" if kind == "chameleon" and tree.get("swin_norm") else "pre",
        "activation": "swiglu",
        "positions": "rope",
        "rope_theta": float(rope.get("rope_theta", 10000.0)),
        "qk_norm": {"llama": "none", "qwen3": "rmsnorm", "chameleon": "layernorm"}[kind],
        "tied": bool(tree.get("tie_word_embeddings", False)),
    }
