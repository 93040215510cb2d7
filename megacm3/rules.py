"""Rules that a config must keep whatever the world size."""

import difflib
import math
from typing import Any

from megacm3.config import CHOICES, MATRICES, Config
from megacm3.errors import ConfigError

NOT_NEGATIVE = (
    *("model.vocab_rows", "model.init_std", "model.init_positions_std", "optimizer.lr", "optimizer.eps"),
    *("optimizer.weight_decay", "optimizer.clip", "optimizer.schedule.warmup", "objective.spans", "objective.z_loss"),
    *("train.steps", "train.tokens", "train.stop_at", "checkpoint.every", "checkpoint.keep", "checkpoint.step"),
    *("data.window", "data.workers", "data.upsample", "data.downsample", "lora.alpha"),
    *("guards.spike", "guards.output_norm", "guards.limit", "watchdog.warn", "watchdog.timeout"),
)


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def check(config: Config) -> None:
    """Rules that need no world size. Raises ConfigError with the value, the rule and the nearest legal value."""
    for key, choices in CHOICES.items():
        if _get(config, key) not in choices:
            near = difflib.get_close_matches(str(_get(config, key)), choices, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"{key} = '{_get(config, key)}'; expected one of {', '.join(choices)}{hint}")
    for key in NOT_NEGATIVE:
        # Written so that a NaN is refused too.
        if not 0 <= _get(config, key) < math.inf:
            raise ConfigError(f"{key} = {_get(config, key)}; expected 0 or more, finite")
    _check_model(config)
    _check_rest(config)
    _check_trained(config)


def _nearest(value: int, multiple: int) -> str:
    below, above = value // multiple * multiple, -(-value // multiple) * multiple
    return f"{below} or {above}" if below else str(above)


def _divides(key: str, value: int, by_key: str, by: int) -> None:
    if value % by:
        raise ConfigError(f"{key} = {value} is not divisible by {by_key} = {by}; nearest: {_nearest(value, by)}")


def _check_model(config: Config) -> None:
    model, parallel = config.model, config.parallel
    sizes = ("layers", "hidden_size", "heads", "kv_heads", "ffn_size", "vocab_size", "sequence_length")
    for name in (*sizes, "qk_norm_groups"):
        if getattr(model, name) < 1:
            raise ConfigError(f"model.{name} = {getattr(model, name)}; expected at least 1")
    for name in ("norm_eps", "rope_theta"):
        if not 0 < getattr(model, name) < math.inf:
            raise ConfigError(f"model.{name} = {getattr(model, name)}; expected a finite number above 0")
    for name in ("tensor", "pipeline"):
        if getattr(parallel, name) < 1:
            raise ConfigError(f"parallel.{name} = {getattr(parallel, name)}; expected at least 1")
    _divides("model.hidden_size", model.hidden_size, "model.heads", model.heads)
    _divides("model.heads", model.heads, "model.kv_heads", model.kv_heads)
    if model.kv_heads < parallel.tensor:
        raise ConfigError(
            f"parallel.tensor = {parallel.tensor} is more than model.kv_heads = {model.kv_heads}; "
            f"each tensor rank needs whole key/value heads: at most parallel.tensor = {model.kv_heads}"
        )
    _divides("model.heads", model.heads, "parallel.tensor", parallel.tensor)
    _divides("model.kv_heads", model.kv_heads, "parallel.tensor", parallel.tensor)
    _divides("model.ffn_size", model.ffn_size, "parallel.tensor", parallel.tensor)
    _divides("model.layers", model.layers, "parallel.pipeline", parallel.pipeline)
    rows = model.vocab_rows or model.vocab_size
    if rows < model.vocab_size:
        raise ConfigError(f"model.vocab_rows = {rows} is less than model.vocab_size = {model.vocab_size}")
    _divides("model.vocab_rows" if model.vocab_rows else "model.vocab_size", rows, "parallel.tensor", parallel.tensor)
    if rows - model.vocab_size >= rows // parallel.tensor:
        nearest = -(-model.vocab_size // parallel.tensor) * parallel.tensor
        raise ConfigError(
            f"model.vocab_rows = {rows} leaves the last of parallel.tensor = {parallel.tensor} ranks without any of "
            f"model.vocab_size = {model.vocab_size} ids; nearest: {nearest}"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError("parallel.sequence = true needs parallel.tensor > 1; found parallel.tensor = 1")
    if parallel.sequence:
        _divides("model.sequence_length", model.sequence_length, "parallel.tensor", parallel.tensor)
    if model.qk_norm != "none":
        _divides("model.heads", model.heads, "model.qk_norm_groups", model.qk_norm_groups)
        groups = min(model.qk_norm_groups, model.kv_heads)
        _divides("model.kv_heads", model.kv_heads, "model.qk_norm_groups", groups)
    if model.positions == "rope" and model.hidden_size // model.heads % 2:
        raise ConfigError(f"model.positions = rope needs an even head size; found {model.hidden_size // model.heads}")


def _check_rest(config: Config) -> None:
    train, data = config.train, config.data
    if (train.steps > 0) == (train.tokens > 0):
        raise ConfigError(f"give either train.steps or train.tokens; found {train.steps} and {train.tokens}")
    positive = ("train.micro_batch", "train.global_batch", "log.every", "log.replicas_every", "objective.sentinels")
    for key in (*positive, "evaluation.every", "evaluation.documents"):
        if _get(config, key) < 1:
            raise ConfigError(f"{key} = {_get(config, key)}; expected at least 1")
    shares = config.retrieval.documents
    if len(shares) != 4 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(
            f"retrieval.documents = {shares}; expected four probabilities (of 0, 1, 2, 3 documents) that add up to 1"
        )
    for key in (
        "data.rotation",
        "data.image_answers",
        "objective.whole_segment",
        "model.dropout",
        "optimizer.schedule.final",
    ):
        if not 0 <= _get(config, key) <= 1:
            raise ConfigError(f"{key} = {_get(config, key)}; expected a share from 0 to 1")
    if config.model.dropout == 1:
        raise ConfigError("model.dropout = 1 drops everything; expected less than 1")
    if data.image_answers and (data.upsample or data.downsample):
        raise ConfigError(
            f"data.image_answers = {data.image_answers} sets the shares that data.upsample = {data.upsample} and "
            f"data.downsample = {data.downsample} bound; give one or the other"
        )
    _check_guards(config)
    if data.position_reset and not data.document_mask:
        raise ConfigError("data.position_reset = true needs data.document_mask = true")
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"optimizer.betas = {betas}; expected two numbers of 0 or more, below 1")


def _check_trained(config: Config) -> None:
    model, choice = config.model, config.train.parameters
    if choice == "norms" and model.norm == "layernorm" and model.qk_norm == "none":
        raise ConfigError(
            "train.parameters = norms, but model.norm = layernorm with model.qk_norm = none has no parameters; "
            "choose all, image_rows or lora"
        )
    if choice == "image_rows" and config.parallel.pipeline == 2 and model.tied and config.train.dtype == "bf16":
        raise ConfigError(
            "train.parameters = image_rows of a tied table with parallel.pipeline = 2 and train.dtype = bf16: the last "
            "stage would have a copy alone, of which DeepSpeed's bf16 optimizer takes no norm; set parallel.pipeline=1"
        )
    if choice == "image_rows" and config.parallel.pipeline > 2:
        raise ConfigError(
            f"train.parameters = image_rows leaves the middle of parallel.pipeline = {config.parallel.pipeline} stages "
            "nothing to train; at most parallel.pipeline=2"
        )
    if choice != "lora":
        return
    if config.lora.rank < 1:
        raise ConfigError(f"lora.rank = {config.lora.rank}; expected at least 1")
    known = [kind for kind in MATRICES if kind != "gate" or model.activation == "swiglu"]
    wrong = [kind for kind in config.lora.matrices if kind not in known]
    if wrong or not config.lora.matrices:
        found = f"'{wrong[0]}'" if wrong else "none"
        raise ConfigError(f"lora.matrices names {found}; expected some of {', '.join(known)}")
    if len(set(config.lora.matrices)) < len(config.lora.matrices):
        raise ConfigError(f"lora.matrices = {config.lora.matrices} names a matrix twice")


def _check_guards(config: Config) -> None:
    checkpoint = config.checkpoint
    if checkpoint.step and checkpoint.resume == "never":
        raise ConfigError(
            f"checkpoint.step = {checkpoint.step} with checkpoint.resume = {checkpoint.resume}; expected a step to go "
            "back to with auto or required, or 0 for the newest"
        )
    if config.guards.window < 8:
        raise ConfigError(f"guards.window = {config.guards.window}; expected at least 8 steps")
    for key in ("guards.skip_steps", "guards.skip_sequences"):
        for pair in _get(config, key):
            if len(pair) != 2 or not 0 <= pair[0] < pair[1]:
                raise ConfigError(f"{key}: {pair} is no range; expected [first, end) such as [1000, 1200]")
