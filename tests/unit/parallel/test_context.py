"""Ranks and groups: the same order as DeepSpeed's and megatron-core's."""

import pytest
import torch
import torch.distributed as dist

from megacm3.parallel.context import ParallelContext, build_context, deepspeed_mpu
from megacm3.parallel.pipeline import bounds
from megacm3.resolve import load_config


def context_of(rank: int, world: int, tensor: int, pipeline: int) -> tuple[ParallelContext, dict[str, list[int]]]:
    """The context of one rank of a fake world, and the members of its groups."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        keys = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
        context = build_context(load_config(None, ["model.preset=tiny_cm3leon", *keys]), torch.device("meta"))
        names = ("tensor_group", "data_group", "pipeline_group", "model_group")
        return context, {name: sorted(dist.get_process_group_ranks(getattr(context, name))) for name in names}
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world, tensor, pipeline", [(8, 2, 2), (4, 4, 1), (4, 1, 4), (16, 2, 4), (1, 1, 1)])
def test_groups_are_those_of_deepspeeds_topology(world: int, tensor: int, pipeline: int) -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=world // tensor // pipeline)
    for rank in range(world):
        context, groups = context_of(rank, world, tensor, pipeline)
        place = topology.get_coord(rank)
        assert (context.tensor_rank, context.data_rank, context.pipeline_rank) == (place.model, place.data, place.pipe)
        for name, axes in (
            ("tensor_group", {"pipe": place.pipe, "data": place.data}),
            ("data_group", {"pipe": place.pipe, "model": place.model}),
            ("pipeline_group", {"data": place.data, "model": place.model}),
            ("model_group", {"data": place.data}),
        ):
            assert groups[name] == sorted(topology.filter_match(**axes)), name
        assert context.is_last_stage == (place.pipe == pipeline - 1)


def test_what_deepspeed_is_told() -> None:
    context, _ = context_of(5, 8, 2, 1)
    mpu = deepspeed_mpu(context)
    assert (mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()) == (1, 2)
    assert (mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()) == (2, 4)
    assert mpu.get_tensor_model_parallel_src_rank() == 4
    assert mpu.get_data_parallel_group() is context.data_group


def test_blocks_are_spread_evenly() -> None:
    table_positions, head = [False, False], [False]
    assert bounds([*table_positions, *[True] * 8, *head], 1) == [0, 11]
    assert bounds([*table_positions, *[True] * 8, *head], 4) == [0, 4, 6, 8, 11]
    assert bounds([*table_positions, *[True] * 4, False, *head], 2) == [0, 4, 8]
