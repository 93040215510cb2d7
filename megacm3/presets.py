"""Named models. Every number has its source; "inferred" says that the paper is silent.

Sources: [CM3Leon] arXiv:2309.02591; [Chameleon] arXiv:2405.09818 and the released model's files; [OPT] the launcher
defaults of the code base that CM3Leon was trained with (inferred for CM3Leon: the paper does not state them).
"""

from collections.abc import Callable
from typing import Any

from megacm3.errors import ConfigError

Tree = dict[str, Any]


def _cm3leon(layers: int, hidden: int, heads: int, lr: float, tokens: int) -> Tree:
    return {
        "model": {
            "family": "cm3leon",
            "layers": layers,  # [CM3Leon] table 3
            "hidden_size": hidden,  # [CM3Leon] table 3
            "heads": heads,  # inferred: [OPT] launcher sizes
            "kv_heads": heads,
            "ffn_size": 4 * hidden,  # inferred: [OPT]
            "vocab_size": 65536,  # 56,320 text + 8,192 image ([CM3Leon] 2.1) + 1,024 special (inferred)
            "sequence_length": 4096,  # [CM3Leon] 2.3
            "norm": "layernorm",  # [CM3Leon] 2.3: no learnable norm parameters
            "norm_eps": 1e-5,  # inferred: the framework's default
            "norm_order": "pre",
            "activation": "relu",  # inferred: [OPT]
            "positions": "learned",  # [CM3Leon] 2.3
            "qk_norm": "none",
            "tied": True,  # inferred: [OPT]
            "dropout": 0.0,  # [CM3Leon] 2.3
            "init": "truncated",  # [CM3Leon] 2.3: std 0.006 cut at 3 std, output layers 0, positions 0.0002
            "init_std": 0.006,
            "init_positions_std": 0.0002,
            "init_residual": "zero",
        },
        "objective": {"kind": "cm3", "spans": 1.0, "whole_segment": 0.5, "sentinels": 512, "z_loss": 0.0},
        "data": {"packing": "blocks", "rotation": 0.0},
        "retrieval": {"documents": [0.0, 0.0, 0.0, 1.0], "max_score": 0.9},  # [CM3Leon] 2.1
        "optimizer": {
            "lr": lr,  # [CM3Leon] table 3
            "betas": [0.9, 0.95],  # inferred: [OPT], as are eps, weight decay, clipping and the schedule
            "eps": 1e-8,
            "weight_decay": 0.1,
            "clip": 1.0,
            "schedule": {"kind": "linear", "warmup": 1500, "final": 0.1},  # warm-up: [CM3Leon] table 3
        },
        "train": {"tokens": tokens, "global_batch": 2048, "dtype": "bf16"},  # 8M tokens as 2^23, [CM3Leon] table 3
    }


def cm3leon_350m() -> Tree:
    """373,293,056 parameters."""
    return _cm3leon(24, 1024, 16, 6e-4, 1_400_000_000_000)


def cm3leon_760m() -> Tree:
    """786,432,000 parameters."""
    return _cm3leon(24, 1536, 16, 5e-4, 1_900_000_000_000)


def cm3leon_7b() -> Tree:
    """6,727,663,616 parameters."""
    return _cm3leon(32, 4096, 32, 1.2e-4, 2_400_000_000_000)


def _llama(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int) -> Tree:
    return {
        "layers": layers,
        "hidden_size": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "ffn_size": ffn,
        "vocab_size": 65536,
        "sequence_length": 4096,
        "norm": "rmsnorm",
        "norm_eps": 1e-5,
        "norm_order": "pre",
        "activation": "swiglu",
        "positions": "rope",
        "rope_theta": 10000.0,
        "tied": False,
        "init": "normal",
        "init_std": 0.02,  # inferred: Llama 2 practice
        "init_residual": "scaled",  # inferred: Llama 2 practice
    }


def _chameleon(model: Tree, global_batch: int, dropout: float, order: str) -> Tree:
    qk_norm = {"family": "chameleon", "qk_norm": "layernorm", "qk_norm_groups": 1}  # [Chameleon] 2.3, released code
    return {
        "model": model | qk_norm | {"dropout": dropout, "norm_order": order},
        "objective": {"kind": "causal", "z_loss": 1e-5},  # [Chameleon] 2.3
        "data": {"packing": "blocks", "rotation": 0.5},  # [Chameleon] 2.2
        "retrieval": {"documents": [1.0, 0.0, 0.0, 0.0]},
        "optimizer": {
            "lr": 1e-4,  # [Chameleon] table 1, as are betas, eps, weight decay, clipping and warm-up (2.3)
            "betas": [0.9, 0.95],
            "eps": 1e-5,
            "weight_decay": 0.1,
            "clip": 1.0,
            # The decay "to 0" has no stated rate; a final share of 1 % is inferred.
            "schedule": {"kind": "exponential", "warmup": 4000, "final": 0.01},
        },
        "train": {"tokens": 9_200_000_000_000, "global_batch": global_batch, "dtype": "bf16"},
    }


def chameleon_7b() -> Tree:
    """7.0B parameters; batch 2^23 tokens, dropout 0.1 ([Chameleon] 2.3)."""
    return _chameleon(_llama(32, 4096, 32, 32, 11008), 2048, 0.1, "pre")


def chameleon_34b() -> Tree:
    """34.3B parameters; batch 3 x 2^22 tokens, norms on the sublayers' outputs, no dropout ([Chameleon] 2.3).

    hidden 8192 and 8 key/value heads are inferred from the conversion code and the parameter count.
    """
    return _chameleon(_llama(48, 8192, 64, 8, 22016), 3072, 0.0, "swin")


def _modern(model: Tree, lr: float) -> Tree:
    return {
        "model": model | {"family": "modern", "qk_norm": "rmsnorm", "qk_norm_groups": 1},
        "objective": {"kind": "cm3", "spans": 1.0, "whole_segment": 0.5, "z_loss": 1e-5},
        "data": {"packing": "whole"},
        "optimizer": {
            "lr": lr,  # our choice
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "weight_decay": 0.1,
            "clip": 1.0,
            "schedule": {"kind": "cosine", "warmup": 2000, "final": 0.1},
        },
        "train": {"tokens": 1_000_000_000_000, "global_batch": 2048, "dtype": "bf16"},
    }


def modern_1b() -> Tree:
    """Ours: RMSNorm, RoPE, SwiGLU, grouped queries, per-head RMS q/k norm; exports to Qwen3ForCausalLM."""
    return _modern(_llama(16, 2048, 32, 8, 8192), 3e-4)


def modern_7b() -> Tree:
    """Ours: as modern_1b at 7B."""
    return _modern(_llama(32, 4096, 32, 8, 11008), 3e-4)


def _twin(tree: Tree, **model: Any) -> Tree:
    small = {"layers": 4, "hidden_size": 64, "heads": 4, "kv_heads": 4, "ffn_size": 128, "vocab_size": 512}
    tree["model"] |= small | {"sequence_length": 64, "init_std": 0.02} | model
    tree["optimizer"]["schedule"]["warmup"] = 10
    tree["objective"]["sentinels"] = 64
    tree["train"] = {"steps": 20, "global_batch": 8, "dtype": "fp32"}
    return tree


def tiny_cm3leon() -> Tree:
    """Twin of cm3leon_* for tests."""
    return _twin(cm3leon_7b())


def tiny_chameleon_7b() -> Tree:
    """Twin of chameleon_7b for tests."""
    return _twin(chameleon_7b(), dropout=0.0)


def tiny_chameleon_34b() -> Tree:
    """Twin of chameleon_34b for tests: swin order, grouped queries, four groups of q/k norm rows."""
    return _twin(chameleon_34b(), heads=8, kv_heads=4, qk_norm_groups=4)


def tiny_modern() -> Tree:
    """Twin of modern_* for tests."""
    return _twin(modern_7b(), kv_heads=2)


PRESETS: dict[str, Callable[[], Tree]] = {
    function.__name__: function
    for function in (
        cm3leon_350m,
        cm3leon_760m,
        cm3leon_7b,
        chameleon_7b,
        chameleon_34b,
        modern_1b,
        modern_7b,
        tiny_cm3leon,
        tiny_chameleon_7b,
        tiny_chameleon_34b,
        tiny_modern,
    )
}


def preset(name: str) -> Tree:
    """The values of a named preset as a nested dict. Raises ConfigError with the list of names."""
    if name not in PRESETS:
        raise ConfigError(f"model.preset = '{name}'; expected one of {', '.join(PRESETS)}")
    tree = PRESETS[name]()
    tree["model"]["preset"] = name
    return tree
