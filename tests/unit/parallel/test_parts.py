"""Boxes of logical tensors: all ranks together hold each number once, wherever it is cut."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megacm3.model.loss import LossState
from megacm3.model.stages import Network, list_stages
from megacm3.parallel import parts
from megacm3.parallel.context import build_context
from megacm3.parallel.parts import named_parts
from megacm3.resolve import load_config

FAMILIES = ["tiny_cm3leon", "tiny_chameleon_7b", "tiny_chameleon_34b", "tiny_modern"]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_rows_and_columns_tile_the_tensor(world: int) -> None:
    for cut in (parts.rows, parts.columns):
        whole = torch.zeros(8, 12)
        for rank in range(world):
            part = cut("x", (8, 12), rank, world)
            whole[tuple(slice(o, o + n) for o, n in zip(part.offset, part.shape, strict=True))] += 1
            assert part.whole == (world == 1)
        assert torch.equal(whole, torch.ones(8, 12))


def held(preset: str, tensor: int, rank: int, *overrides: str) -> Network:
    """What one tensor rank of several builds, on the meta device under a fake process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tensor)
    try:
        config = load_config(None, [f"model.preset={preset}", f"parallel.tensor={tensor}", *overrides])
        context = replace(build_context(config, torch.device("meta")))
        kinds = torch.zeros(config.model.vocab_size, dtype=torch.uint8)
        with torch.device("meta"):
            return Network(list_stages(config, context, kinds, LossState()))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("preset", FAMILIES)
@pytest.mark.parametrize("tensor", [1, 2])
def test_all_ranks_together_hold_every_number_once(preset: str, tensor: int) -> None:
    count: dict[str, torch.Tensor] = {}
    for rank in range(tensor):
        for parameter, part in named_parts(held(preset, tensor, rank)):
            place = tuple(slice(o, o + n) for o, n in zip(part.offset, part.shape, strict=True))
            times = count.setdefault(part.name, torch.zeros(part.global_shape))
            replicated = not parameter.tensor_model_parallel
            times[place] += 1 / tensor if replicated and tensor > 1 else 1
    assert all(torch.equal(times, torch.ones_like(times)) for times in count.values())


@pytest.mark.parametrize("preset", FAMILIES)
@pytest.mark.parametrize("tensor", [1, 2])
def test_the_parts_of_a_parameter_tile_its_rows(preset: str, tensor: int) -> None:
    for rank in range(tensor):
        for parameter in held(preset, tensor, rank).parameters():
            rows = [row for part in parameter.parts for row in range(part.start, part.start + part.shape[0])]
            assert rows == list(range(parameter.shape[0]))
            assert all(part.shape[1:] == parameter.shape[1:] for part in parameter.parts)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_padding_rows_belong_to_no_logical_tensor(tensor: int) -> None:
    rows = 0
    for rank in range(tensor):
        network = held("tiny_chameleon_7b", tensor, rank, "model.vocab_size=500", "model.vocab_rows=512")
        for parameter, part in named_parts(network):
            if part.name in ("embed.weight", "head.weight"):
                assert parameter.shape[0] == 512 // tensor and part.global_shape[0] == 500
                rows += part.shape[0]
    assert rows == 2 * 500


@pytest.mark.parametrize("preset", FAMILIES)
def test_which_parameters_are_replicated(preset: str) -> None:
    """The mark decides how often a gradient counts in the norm: norms and positions once, all else on every rank."""
    for parameter, part in named_parts(held(preset, 2, 1)):
        assert parameter.tensor_model_parallel == ("norm" not in part.name and part.name != "positions.weight")
