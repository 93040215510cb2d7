"""Degrees, ranks and process groups of one rank, in one frozen object that is passed and never global.

Rank order (tensor fastest, then data, then pipeline) is the one of DeepSpeed's `PipeModelDataParallelTopology` and of
megatron-core's default, so that both agree with it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megacm3.config import Config
from megacm3.errors import ConfigError


@dataclass(frozen=True)
class ParallelContext:
    """Where this rank stands. Sizes are degrees, ranks are positions along each axis."""

    rank: int
    world: int
    tensor: int
    data: int
    pipeline: int
    sequence: bool
    """Sequence parallel is on."""
    tensor_group: Any
    data_group: Any
    pipeline_group: Any
    model_group: Any
    """Tensor x pipeline: all ranks that hold one copy of the model."""
    control_group: Any
    """All ranks, on the CPU: signals and bookkeeping."""
    device: torch.device

    def __str__(self) -> str:
        sequence = ", sequence parallel" if self.sequence else ""
        return (
            f"{self.world} ranks on {self.device.type}: tensor {self.tensor}, data {self.data}, "
            f"pipeline {self.pipeline}{sequence}"
        )

    @property
    def tensor_rank(self) -> int:
        """Position along the tensor axis."""
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        """Position along the data axis."""
        return self.rank // self.tensor % self.data

    @property
    def pipeline_rank(self) -> int:
        """Stage of the pipeline."""
        return self.rank // (self.tensor * self.data)

    @property
    def is_last_stage(self) -> bool:
        """Whether the loss is computed here."""
        return self.pipeline_rank == self.pipeline - 1


def check_world(config: Config, world: int) -> int:
    """The data-parallel degree of `world` ranks. Raises ConfigError when the degrees do not divide it."""
    model = config.parallel.tensor * config.parallel.pipeline
    if world % model:
        nearest = max(model, world // model * model)
        raise ConfigError(
            f"{world} processes cannot be cut into parallel.tensor = {config.parallel.tensor} x "
            f"parallel.pipeline = {config.parallel.pipeline}; start a multiple of {model}, for example {nearest}"
        )
    return world // model


def accumulation(config: Config, data: int) -> int:
    """Micro-batches of a step on each data-parallel rank. Raises ConfigError with the arithmetic."""
    micro, total = config.train.micro_batch, config.train.global_batch
    if total % (micro * data):
        below, above = total // (micro * data) * micro * data, -(-total // (micro * data)) * micro * data
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"train.global_batch = {total} is not train.micro_batch {micro} x {data} data-parallel ranks x a whole "
            f"number of accumulation steps ({total} / {micro * data} = {total / (micro * data):.2f}); "
            f"nearest legal train.global_batch: {nearest}"
        )
    return total // (micro * data)


def _groups(ranks: np.ndarray, rank: int) -> Any:
    # Every process must create every group, in the same order; it keeps the one that it belongs to.
    mine = None
    for members in ranks:
        group = dist.new_group(members.tolist())
        if rank in members:
            mine = group
    return mine


def _give_megatron_its_buffer() -> None:
    # megatron-core's linear layers gather sequence-parallel inputs into one process-wide buffer, which its own
    # initialisation would make; all else of it takes explicit groups.
    from megatron.core import parallel_state

    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


def build_context(config: Config, device: torch.device) -> ParallelContext:
    """Build the groups of this rank. torch.distributed must be initialised. Raises ConfigError for an unfit world."""
    world, rank = dist.get_world_size(), dist.get_rank()
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    data = check_world(config, world)
    if config.parallel.sequence:
        _give_megatron_its_buffer()
    grid = np.arange(world).reshape(pipeline, data, tensor)
    return ParallelContext(
        rank=rank,
        world=world,
        tensor=tensor,
        data=data,
        pipeline=pipeline,
        sequence=config.parallel.sequence,
        tensor_group=_groups(grid.reshape(-1, tensor), rank),
        data_group=_groups(grid.transpose(0, 2, 1).reshape(-1, data), rank),
        pipeline_group=_groups(grid.transpose(1, 2, 0).reshape(-1, pipeline), rank),
        model_group=_groups(grid.transpose(1, 0, 2).reshape(data, -1), rank),
        control_group=dist.new_group(backend="gloo" if device.type == "cuda" else None),
        device=device,
    )


def deepspeed_mpu(context: ParallelContext) -> Any:
    """The object of getters through which a DeepSpeed engine (without its pipeline) learns the groups."""

    class Mpu:
        """Only what DeepSpeed calls."""

        get_model_parallel_rank = get_tensor_model_parallel_rank = staticmethod(lambda: context.tensor_rank)
        get_model_parallel_world_size = get_tensor_model_parallel_world_size = staticmethod(lambda: context.tensor)
        get_model_parallel_group = get_tensor_model_parallel_group = staticmethod(lambda: context.tensor_group)
        get_tensor_model_parallel_src_rank = staticmethod(lambda: context.rank - context.tensor_rank)
        get_data_parallel_rank = staticmethod(lambda: context.data_rank)
        get_data_parallel_world_size = staticmethod(lambda: context.data)
        get_data_parallel_group = staticmethod(lambda: context.data_group)

    return Mpu
