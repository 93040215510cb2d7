"""One process as a group of one: what the model's layers need to be built without a launcher."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megacm3.config import Config
from megacm3.model.loss import LossState
from megacm3.model.stages import Network, list_stages
from megacm3.parallel.context import ParallelContext, build_context
from megacm3.resolve import load_config

BASE = ["train.micro_batch=1", "model.init_std=0.1"]


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    """A world of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build_context(load_config(None, [*BASE, "model.preset=tiny_cm3leon"]), torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture
def configure() -> Callable[..., Config]:
    """configure("tiny_cm3leon", "model.dropout=0.1") -> Config."""
    return lambda preset, *overrides: load_config(None, [f"model.preset={preset}", *BASE, *overrides])


@pytest.fixture
def network(
    context: ParallelContext, configure: Callable[..., Config]
) -> Callable[..., tuple[Network, LossState, Config]]:
    """network("tiny_cm3leon", ...) -> (Network, its LossState, Config)."""

    def build(preset: str, *overrides: Any) -> tuple[Network, LossState, Config]:
        config, state = configure(preset, *overrides), LossState()
        kinds = torch.arange(config.model.vocab_size, dtype=torch.uint8) % 3
        return Network(list_stages(config, context, kinds, state)), state, config

    return build
