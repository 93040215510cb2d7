"""Named models. The comment on a line names the source of its numbers; "inferred" says that the paper is silent.

Sources: [CM3Leon] arXiv:2309.02591; [Chameleon] arXiv:2405.09818; [released] files and code of the released Chameleon;
[CM3] arXiv:2201.07520; [OPT] the launcher defaults of the code base that CM3Leon was trained with; [Llama 2]
arXiv:2307.09288; "our choice" where no paper has a say. tests/unit/test_presets.py holds every line to it.
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
            "kv_heads": heads,  # inferred: [OPT]
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
            "init": "truncated",  # [CM3Leon] 2.3: cut at 3 standard deviations
            "init_std": 0.006,  # [CM3Leon] 2.3
            "init_positions_std": 0.0002,  # [CM3Leon] 2.3
            "init_residual": "zero",  # [CM3Leon] 2.3; that these are the residual outputs is inferred
        },
        "objective": {
            "kind": "cm3",  # [CM3Leon] 2.2
            "spans": 1.0,  # [CM3]; inferred for CM3Leon
            "whole_segment": 0.5,  # our choice: the paper has no figure
            "sentinels": 512,  # inferred: the code base's default
            "z_loss": 0.0,  # [CM3Leon] has none
        },
        "data": {"packing": "blocks", "rotation": 0.0},  # inferred: the code base's default
        "retrieval": {"documents": [0.0, 0.0, 0.0, 1.0], "max_score": 0.9},  # [CM3Leon] 2.1
        "optimizer": {
            "lr": lr,  # [CM3Leon] table 3
            "betas": [0.9, 0.95],  # inferred: [OPT]
            "eps": 1e-8,  # inferred: [OPT]
            "weight_decay": 0.1,  # inferred: [OPT]
            "clip": 1.0,  # inferred: [OPT]
            # The decay is inferred: [OPT].
            "schedule": {"kind": "linear", "warmup": 1500, "final": 0.1},  # [CM3Leon] table 3
        },
        # 8M tokens taken as 2^23; the precision is inferred.
        "train": {"tokens": tokens, "global_batch": 2048, "dtype": "bf16"},  # [CM3Leon] table 3
    }


def cm3leon_350m() -> Tree:
    """373,293,056 parameters."""
    return _cm3leon(24, 1024, 16, 6e-4, 1_400_000_000_000)  # [CM3Leon] table 3; the heads inferred: [OPT]


def cm3leon_760m() -> Tree:
    """786,432,000 parameters."""
    return _cm3leon(24, 1536, 16, 5e-4, 1_900_000_000_000)  # [CM3Leon] table 3; the heads inferred: [OPT]


def cm3leon_7b() -> Tree:
    """6,727,663,616 parameters."""
    return _cm3leon(32, 4096, 32, 1.2e-4, 2_400_000_000_000)  # [CM3Leon] table 3; the heads inferred: [OPT]


def _llama(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int) -> Tree:
    # [Chameleon] 2.3 follows [Llama 2]; modern_* too, by our choice.
    return {
        "layers": layers,
        "hidden_size": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "ffn_size": ffn,
        "vocab_size": 65536,  # [Chameleon] 2.1, the image codes among them
        "sequence_length": 4096,  # [Chameleon] table 1
        "norm": "rmsnorm",
        "norm_eps": 1e-5,  # [released]
        "norm_order": "pre",
        "activation": "swiglu",
        "positions": "rope",
        "rope_theta": 10000.0,  # [released]
        "tied": False,
        "init": "normal",
        "init_std": 0.02,  # inferred: practice around [Llama 2]
        "init_residual": "scaled",  # inferred: the same
    }


def _chameleon(model: Tree, global_batch: int, dropout: float, order: str) -> Tree:
    qk_norm = {"family": "chameleon", "qk_norm": "layernorm", "qk_norm_groups": 1}  # [released] code
    return {
        "model": model | qk_norm | {"dropout": dropout, "norm_order": order},
        "objective": {"kind": "causal", "z_loss": 1e-5},  # [Chameleon] 2.3
        "data": {"packing": "blocks", "rotation": 0.5},  # [Chameleon] 2.2
        "retrieval": {"documents": [1.0, 0.0, 0.0, 0.0]},  # [Chameleon] retrieves nothing
        "optimizer": {
            "lr": 1e-4,  # [Chameleon] table 1
            "betas": [0.9, 0.95],  # [Chameleon] 2.3
            "eps": 1e-5,  # [Chameleon] 2.3
            "weight_decay": 0.1,  # [Chameleon] 2.3
            "clip": 1.0,  # [Chameleon] 2.3
            # The decay "to 0" has no stated rate: the final share of 1 % is inferred.
            "schedule": {"kind": "exponential", "warmup": 4000, "final": 0.01},  # [Chameleon] 2.3
        },
        # 2.1 passes over 4.4T tokens; the precision is inferred.
        "train": {"tokens": 9_200_000_000_000, "global_batch": global_batch, "dtype": "bf16"},  # [Chameleon] table 1
    }


def chameleon_7b() -> Tree:
    """7,013,158,912 parameters; batch 2^23 tokens."""
    shape = _llama(32, 4096, 32, 32, 11008)  # [Chameleon] table 1 and [released]
    return _chameleon(shape, 2048, 0.1, "pre")  # [Chameleon] 2.3


def chameleon_34b() -> Tree:
    """34,293,448,704 parameters; batch 3 x 2^22 tokens, norms on the sublayers' outputs, no dropout.

    hidden 8192 and 8 key/value heads are inferred from the conversion code and the parameter count.
    """
    shape = _llama(48, 8192, 64, 8, 22016)  # [released]; hidden size and key/value heads inferred
    return _chameleon(shape, 3072, 0.0, "swin")  # [Chameleon] 2.3


def _modern(model: Tree, lr: float) -> Tree:
    return {
        # One row of q/k norm for all heads, as Qwen3ForCausalLM has it.
        "model": model | {"family": "modern", "qk_norm": "rmsnorm", "qk_norm_groups": 1},  # our choice
        "objective": {"kind": "cm3", "spans": 1.0, "whole_segment": 0.5, "z_loss": 1e-5},  # our choice, as the papers'
        "data": {"packing": "whole"},
        "optimizer": {
            "lr": lr,  # our choice
            "betas": [0.9, 0.95],  # our choice, as the papers'
            "eps": 1e-8,  # our choice
            "weight_decay": 0.1,  # our choice, as the papers'
            "clip": 1.0,  # our choice, as the papers'
            "schedule": {"kind": "cosine", "warmup": 2000, "final": 0.1},  # our choice
        },
        "train": {"tokens": 1_000_000_000_000, "global_batch": 2048, "dtype": "bf16"},  # our choice
    }


def modern_1b() -> Tree:
    """Ours: RMSNorm, RoPE, SwiGLU, grouped queries, per-head RMS q/k norm; exports to Qwen3ForCausalLM."""
    return _modern(_llama(16, 2048, 32, 8, 8192), 3e-4)  # our choice, near Llama 3.2 1B


def modern_7b() -> Tree:
    """Ours: as modern_1b at 7B."""
    return _modern(_llama(32, 4096, 32, 8, 11008), 3e-4)  # our choice


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
