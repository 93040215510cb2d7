"""A DeepSpeed JSON of ds_configs/, checked against the config and filled in.

The config decides batch sizes, clipping, dtype and optimizer; the JSON decides the ZeRO stage, offloading and buffers.
What would contradict is refused before any engine exists. ds_configs/README.md has the same rules for readers.
"""

import json
from pathlib import Path
from typing import Any

from megacm3.config import Config
from megacm3.errors import ConfigError
from megacm3.parallel.context import accumulation

LEGAL = """ZeRO   pipeline = 1   pipeline > 1
  0        yes            fp32 only
  1        yes            yes
  2, 3     yes            no
offload_optimizer: ZeRO 1-3 without a pipeline; offload_param: ZeRO 3"""

DEFAULT_JSON = Path(__file__).resolve().parent.parent.parent / "ds_configs" / "zero1.json"

_OURS = (
    "optimizer",
    "scheduler",
    "fp16",
    "amp",
    "tensor_parallel",
    "activation_checkpointing",
    "sequence_parallel_size",
)
"""Sections whose content megacm3's config decides."""

_KEYS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch / (train.micro_batch x data-parallel ranks)",
    "gradient_clipping": "optimizer.clip",
    "bf16.enabled": "train.dtype",
}


def read_deepspeed_json(config: Config) -> dict[str, Any]:
    """The DeepSpeed JSON that the config names. Raises ConfigError when it is missing or not JSON."""
    path = Path(config.deepspeed or DEFAULT_JSON)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as fault:
        raise ConfigError(f"deepspeed = {path} does not exist; ds_configs/ holds one for each ZeRO stage") from fault
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise ConfigError(f"deepspeed = {path} is not JSON: {fault}") from fault
    if not isinstance(tree, dict):
        raise ConfigError(f"deepspeed = {path} holds no JSON object")
    for section in ("zero_optimization", "bf16", "pipeline", "data_types"):
        if not isinstance(tree.get(section, {}), dict):
            raise ConfigError(f"deepspeed = {path}: '{section}' is {tree[section]!r}; expected an object")
    stage = tree.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"deepspeed = {path}: zero_optimization.stage = {stage!r}; expected 0, 1, 2 or 3")
    return tree


def zero_stage(tree: dict[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed JSON."""
    return int(tree.get("zero_optimization", {}).get("stage", 0))


def offloads(tree: dict[str, Any], what: str) -> bool:
    """Whether the JSON moves "optimizer" or "param" to the CPU's memory."""
    return (tree.get("zero_optimization", {}).get(f"offload_{what}") or {}).get("device", "none") != "none"


def _check_stage(config: Config, tree: dict[str, Any], name: str) -> None:
    stage, pipeline = zero_stage(tree), config.parallel.pipeline
    if pipeline > 1 and (stage > 1 or (stage == 0 and config.train.dtype == "bf16")):
        raise ConfigError(
            f"parallel.pipeline = {pipeline} with ZeRO stage {stage} ({name}, {config.train.dtype}) is not possible; "
            f"use ds_configs/zero1.json, or parallel.pipeline=1. Legal:\n{LEGAL}"
        )
    for what, lowest in (("optimizer", 1), ("param", 3)):
        if offloads(tree, what) and (stage < lowest or pipeline > 1):
            raise ConfigError(
                f"{name}: offload_{what} with ZeRO stage {stage} and parallel.pipeline = {pipeline} is not possible; "
                f"remove it, or see ds_configs/offload.json. Legal:\n{LEGAL}"
            )
        device = (tree.get("zero_optimization", {}).get(f"offload_{what}") or {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise ConfigError(f"{name}: offload_{what}.device = '{device}'; expected 'cpu', from where it can be saved")
    if tree.get("zero_optimization", {}).get("round_robin_gradients"):
        raise ConfigError(f"{name}: round_robin_gradients = true cannot be saved in a checkpoint; set it to false")


def _fill_batch(config: Config, tree: dict[str, Any], data: int, name: str) -> None:
    expected = {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": accumulation(config, data),
        "gradient_clipping": config.optimizer.clip,
        "bf16.enabled": config.train.dtype == "bf16",
    }
    for dotted, value in expected.items():
        node = tree
        *path, leaf = dotted.split(".")
        for part in path:
            node = node.setdefault(part, {})
        found = node.get(leaf, "auto")
        if found != "auto" and found != value:
            raise ConfigError(
                f'{name}: {dotted} = {found} contradicts {_KEYS[dotted]} (= {value}); write "auto" or the same value'
            )
        node[leaf] = value


def _fill_pipeline(config: Config, tree: dict[str, Any], name: str) -> None:
    # DeepSpeed's default hands on slices of activations, as if tensor ranks held the same ones: a wrong loss, silently.
    pipeline = tree.setdefault("pipeline", {})
    for flag in ("pipe_partitioned", "grad_partitioned"):
        if pipeline.get(flag, False) and config.parallel.pipeline > 1:
            raise ConfigError(
                f"{name}: pipeline.{flag} = true hands wrong activations between stages when tensor ranks hold "
                "different ones; remove it or set it to false"
            )
        pipeline[flag] = False


def _fill_dtypes(config: Config, tree: dict[str, Any], name: str) -> None:
    # Gradients of bf16 weights are summed in fp32, over micro-batches and in the optimizer; DeepSpeed's own default is
    # bf16. ZeRO-0 has no such sum.
    stage, bf16 = zero_stage(tree), config.train.dtype == "bf16"
    types = tree.setdefault("data_types", {})
    found = types.get("grad_accum_dtype", "auto")
    if found == "auto":
        types["grad_accum_dtype"] = "fp32" if stage or not bf16 else "bf16"
    elif (not bf16 and found != "fp32") or (bf16 and not stage and found != "bf16"):
        raise ConfigError(
            f"{name}: data_types.grad_accum_dtype = {found} is not possible with train.dtype = {config.train.dtype} "
            f'and ZeRO stage {stage}; write "auto"'
        )
    if tree.get("communication_data_type", "auto") == "auto":
        # DeepSpeed's default is the weights' type; summed over hundreds of ranks, bf16 loses what fp32 sums have kept.
        tree["communication_data_type"] = "fp32"
    if bf16 and stage == 1:
        # Else the bf16 gradients stay beside the fp32 sums until the step.
        tree["bf16"].setdefault("immediate_grad_update", True)


def fill_deepspeed_json(config: Config, data: int) -> dict[str, Any]:
    """The DeepSpeed JSON with its "auto" values filled in. Raises ConfigError for what contradicts the config.

    data: number of data-parallel ranks.
    """
    tree = read_deepspeed_json(config)
    name = config.deepspeed or DEFAULT_JSON.name
    for section in _OURS:
        given = tree.get(section)
        if given and (not isinstance(given, dict) or given.get("enabled", True)):
            raise ConfigError(f"{name}: section '{section}' contradicts megacm3's config, which decides it; remove it")
    _check_stage(config, tree, name)
    _fill_batch(config, tree, data, name)
    _fill_pipeline(config, tree, name)
    _fill_dtypes(config, tree, name)
    zero = tree.setdefault("zero_optimization", {"stage": 0})
    if zero.get("stage3_param_persistence_threshold") == "auto":
        # What is smaller than a few vectors is kept whole: gathering it costs more than holding it.
        zero["stage3_param_persistence_threshold"] = 10 * config.model.hidden_size
    if own_clipping(tree):
        tree["gradient_clipping"] = 0.0
    tree["zero_allow_untested_optimizer"] = True
    tree["zero_force_ds_cpu_optimizer"] = False
    if tree.get("steps_per_print", "auto") == "auto":
        tree["steps_per_print"] = 10**9
    return tree


def own_clipping(tree: dict[str, Any]) -> bool:
    """Whether gradients are clipped by parallel/optimizer.py instead of DeepSpeed."""
    return zero_stage(tree) == 0
