"""Whether a run's states fit into memory at all, asked before any of them is made."""

import os

import torch

from megacm3.config import Config
from megacm3.errors import ConfigError
from megacm3.planning.layout import Layout, layout_of, rank_parameters
from megacm3.planning.memory import state_bytes


def least_bytes(config: Config, layout: Layout) -> tuple[int, int]:
    """(device, host) bytes of weights, gradients and optimizer on the fullest rank, activations left out.

    Where a part of the model trains, the weights alone.
    """
    device = host = 0
    for stage in range(layout.pipeline):
        memory = state_bytes(rank_parameters(config.model, layout, stage), layout, config.optimizer.kind)
        whole = config.train.parameters == "all"
        device = max(device, memory.states if whole else memory.parameters)
        host = max(host, memory.host)
    return device, host


def check_room(config: Config, world: int, device: torch.device) -> None:
    """Raise ConfigError when the states of a rank are larger than its GPU, or those of this machine's ranks than its
    memory: such a run would end in the middle of its start, on the CPU by a kill without a word."""
    import psutil

    on_device, on_host = least_bytes(config, layout_of(config, world))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    memory = psutil.virtual_memory().total + psutil.swap_memory().total
    if device.type == "cuda":
        _check(on_device, torch.cuda.get_device_properties(device).total_memory, "a rank", str(device))
        _check(on_host * ranks, memory, f"{ranks} ranks", "this machine")
    else:
        _check((on_device + on_host) * ranks, memory, f"{ranks} rank{'s' * (ranks > 1)}", "this machine")


def _check(needed: int, there: int, who: str, where: str) -> None:
    if needed > there:
        raise ConfigError(
            f"weights, gradients and optimizer of {who} take {needed / 2**30:.1f} GiB; {where} has {there / 2**30:.1f} "
            "GiB: use more ranks, tensor or pipeline parallelism, another ZeRO stage or a smaller model (tools/plan.py)"
        )
