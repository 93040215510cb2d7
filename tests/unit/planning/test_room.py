"""A run whose states cannot fit is refused before anything is built."""

import psutil
import pytest
import torch

from megacm3.errors import ConfigError
from megacm3.planning.layout import layout_of
from megacm3.planning.room import check_room, least_bytes
from megacm3.resolve import load_config
from tests.helpers.layouts import path_of

CPU = torch.device("cpu")


def config(*overrides: str, preset: str = "tiny_cm3leon", zero: int | str = 1):
    return load_config(None, [f"model.preset={preset}", f"deepspeed={path_of(zero)}", *overrides])


def test_a_tiny_run_fits() -> None:
    check_room(config(), 1, CPU)


def test_states_above_the_memory_are_refused_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    there = psutil.virtual_memory().total + psutil.swap_memory().total
    # Fp32 under ZeRO-1: weights, gradients, masters and two moments of every number.
    layers = 2 + there // (5 * 4 * 12 * 4096**2)
    huge = config(f"model.layers={layers}", preset="cm3leon_7b")
    with pytest.raises(ConfigError, match=r"of 1 rank take \d+\.\d GiB; this machine has \d+\.\d GiB: use more ranks"):
        check_room(huge, 1, CPU)
    # All ranks of a machine share its memory: half of the states on each of two take as much.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="of 2 ranks take"):
        check_room(load_config(None, [*_keys(huge), "parallel.tensor=2"]), 2, CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    check_room(load_config(None, [*_keys(huge), "parallel.tensor=2"]), 2, CPU)


def _keys(given) -> list[str]:
    return [f"model.preset={given.model.preset}", f"model.layers={given.model.layers}", f"deepspeed={path_of(1)}"]


def test_what_counts_as_least() -> None:
    """In bf16 on one rank 2 bytes of weights, 4 of gradients, 12 of masters and moments a number; a part: weights."""
    count = 6_727_663_616
    for keys, width in (((), 18), (("train.parameters=image_rows",), 2)):
        found = config("train.dtype=bf16", *keys, preset="cm3leon_7b")
        assert least_bytes(found, layout_of(found, 1)) == (pytest.approx(width * count, rel=0.02), 0)
    offloaded = config("train.dtype=bf16", preset="cm3leon_7b", zero="offload")
    device, host = least_bytes(offloaded, layout_of(offloaded, 1))
    assert device < 8 * 6.8e9 and host > 12 * 6.7e9
