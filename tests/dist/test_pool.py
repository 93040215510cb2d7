"""The helper that every distributed test stands on: results by rank, clean state, plain reports of what went wrong."""

import os
import signal
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from tests.helpers.distributed import RankError, run_distributed


@dataclass
class Shard:
    """Shows that classes of a test module travel both ways."""

    rank: int
    tensor: torch.Tensor


def all_reduced(shard: Shard) -> Shard:
    dist.init_process_group("gloo")
    mine = shard.tensor * (dist.get_rank() + 1)
    dist.all_reduce(mine)
    return Shard(dist.get_rank(), mine)


def leave_state() -> int:
    import deepspeed
    from deepspeed.comm import comm
    from megatron.core import parallel_state

    assert not dist.is_initialized() and comm.cdb is None and not parallel_state.model_parallel_is_initialized()
    # What megacm3.parallel.cpu.prepare does for real runs: no compiler for an op that gloo replaces.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    return parallel_state.get_tensor_model_parallel_rank()


def misbehave(how: str, rank: int) -> None:
    dist.init_process_group("gloo")
    print("a line before it happened")
    if dist.get_rank() == rank:
        if how == "raise":
            raise ValueError("a telling message")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "leave":
            os._exit(3)
    stay_here()


def stay_here() -> None:
    time.sleep(600)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_runs_and_answers(world_size: int) -> None:
    answers = run_distributed(all_reduced, world_size, shard=Shard(-1, torch.ones(3)))
    total = world_size * (world_size + 1) / 2
    assert [answer.rank for answer in answers] == list(range(world_size))
    assert all(torch.equal(answer.tensor, torch.full((3,), total)) for answer in answers)


def test_nothing_is_left_of_a_case() -> None:
    assert run_distributed(leave_state, 2) == [0, 1]
    assert run_distributed(leave_state, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "how, expected",
    [
        ("raise", "ValueError: a telling message"),
        ("die", "rank 1: died of SIGKILL"),
        ("leave", "rank 1: left with exit code 3"),
    ],
)
def test_the_first_failure_is_named_first(how: str, expected: str) -> None:
    with pytest.raises(RankError) as caught:
        run_distributed(misbehave, 2, how=how, rank=1)
    first, second = str(caught.value).split("\n\n")
    assert first.startswith("rank 1: ") and expected in first and "a line before it happened" in first
    assert second.startswith("rank 0: was still running 2 s after rank 1 failed")
    assert run_distributed(all_reduced, 2, shard=Shard(-1, torch.ones(1)))[0].tensor == 3


def test_a_hang_shows_the_stacks() -> None:
    with pytest.raises(RankError, match=r"rank 0: was still running after 2 s(?s:.*)in stay_here(?s:.*)rank 1: was"):
        run_distributed(misbehave, 2, timeout=2, how="hang", rank=0)


def test_functions_inside_functions_are_refused() -> None:
    with pytest.raises(TypeError, match="top level"):
        run_distributed(lambda: None, 2)
