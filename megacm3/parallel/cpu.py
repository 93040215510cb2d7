"""The only place that patches: what megacm3 needs to run on machines without CUDA. Inert where CUDA is."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megacm3.errors import ConfigError


def choose_device(wanted: str) -> torch.device:
    """The device of this process: auto | cpu | cuda. Raises ConfigError for cuda where there is none."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError("train.device = cuda, but torch sees no CUDA device here; set train.device=cpu or auto")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {index} has no CUDA device of its own: {torch.cuda.device_count()} are visible; "
            "start at most one process a device"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def prepare(device: torch.device) -> None:
    """Make DeepSpeed and megatron-core usable on `device`. Call before either is imported.

    On the CPU: DeepSpeed's accelerator is named, its shared-memory collective is not compiled (90 s at first use, and
    gloo serves), and megatron-core's `torch.cuda.current_device()` answers with the CPU.
    """
    if device.type == "cuda":
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    # By name: the package's own attribute `torch` is the library, not its submodule.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]


@contextmanager
def pretending(device: torch.device) -> Iterator[None]:
    """For dry runs: new tensors, megatron-core's own among them, are made on `device`, whatever this machine has."""
    from megatron.core import parallel_state

    current, buffer = torch.cuda.current_device, parallel_state._GLOBAL_MEMORY_BUFFER
    torch.cuda.current_device = lambda: device  # type: ignore[assignment,return-value]
    parallel_state._GLOBAL_MEMORY_BUFFER = None
    try:
        with device:
            yield
    finally:
        torch.cuda.current_device, parallel_state._GLOBAL_MEMORY_BUFFER = current, buffer
