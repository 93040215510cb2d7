"""Low-rank adapters of a checkpoint as a folder that PEFT loads over the base model's export."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from megacm3.checkpoint.boxes import whole
from megacm3.checkpoint.merged import is_adapter
from megacm3.checkpoint.pieces import PARAM
from megacm3.checkpoint.reader import Checkpoint
from megacm3.checkpoint.reshard import config_of, find_step
from megacm3.convert.names import export_kind, names
from megacm3.errors import CheckpointError
from megacm3.files import new_folder, write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ENDS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}


def write_adapter(checkpoint: str | Path, output: str | Path, base: str) -> tuple[Path, int]:
    """Write the folder; return it and the number of adapted matrices.

    base: what the folder names as its base model. Raises CheckpointError when the checkpoint has no adapters.
    """
    source = Checkpoint(find_step(checkpoint), verify="sha256")
    factors = [name for name in source.shapes if is_adapter(name)]
    if not factors:
        raise CheckpointError(f"{source.folder} has no adapters; only a run with train.parameters = lora has")
    config = config_of(source.config, 1, 1)
    table = {name.logical.removesuffix(".weight"): name.hf for name in names(export_kind(config.model), config.model)}
    tensors, modules = {}, set()
    for name in factors:
        stem, _, end = name.rpartition(".")
        module = table[stem].removesuffix(".weight")
        values = torch.empty(source.shapes[name], dtype=source.kinds[PARAM])
        source.read(PARAM, name, whole(source.shapes[name]), values)
        tensors[f"base_model.model.{module}.{_ENDS[end]}"] = values
        modules.add(module.rpartition(".")[2])
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(modules),
    }
    with new_folder(output) as folder:
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        write_json(folder / CONFIG, settings)
    return Path(output), len(factors) // 2
