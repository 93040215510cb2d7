"""What a resumed run may change: nothing of the network, the rest by name, its layout freely."""

import dataclasses
from typing import Any

import pytest

from megacm3.errors import CheckpointError, ConfigError
from megacm3.resolve import load_config
from megacm3.training.agreement import changed_keys, check_override, free_parts

BASE = ["model.preset=tiny_cm3leon", "train.steps=10", "data.mixture=[{store: a, weight: 1.0}, {store: b}]"]


def changes(*overrides: str, saved: dict[str, Any] | None = None) -> list[tuple[str, Any, Any]]:
    before = saved or dataclasses.asdict(load_config(None, BASE))
    return [tuple(change) for change in changed_keys(before, load_config(None, [*BASE, *overrides]))]


def test_layout_places_and_operation_are_free() -> None:
    free = ["parallel.tensor=2", "train.micro_batch=2", "log.every=7", "guards.spike=3", "checkpoint.keep=9"]
    moved = [
        "data.mixture=[{store: c, weight: 1.0}, {store: d}]",
        "data.workers=0",
        "watchdog.timeout=9",
        "evaluation.every=7",
    ]
    assert changes(*free, *moved) == []


def test_structure_is_refused_with_every_key() -> None:
    with pytest.raises(CheckpointError) as told:
        changes("model.ffn_size=96", "optimizer.kind=sgd", "data.seed=3", "checkpoint.override=[model.ffn_size]")
    for words in ("model.ffn_size was", "is now 96", "optimizer.kind was adamw, is now sgd", "data.seed was 0"):
        assert words in str(told.value)


def test_schedule_and_weights_must_be_named() -> None:
    given = ["optimizer.schedule.warmup=5", "data.mixture=[{store: a, weight: 3.0}, {store: b}]"]
    with pytest.raises(CheckpointError, match=r"data.mixture.0.weight was 1.0, is now 3.0.*checkpoint.override"):
        changes(*given, "checkpoint.override=[optimizer.schedule]")
    found = changes(*given, "checkpoint.override=[optimizer.schedule, data.mixture]")
    assert ("data.mixture.0.weight", 1.0, 3.0) in found and ("optimizer.schedule.warmup", 10, 5) in found


def test_what_is_named_frees_only_what_it_decides_of_the_stream() -> None:
    assert free_parts([]) == free_parts(["optimizer.lr", "train.steps"]) == set()
    assert free_parts(["data.mixture.weight"]) == free_parts(["data.stages"]) == {"stages"}
    assert free_parts(["data.mixture"]) == {"stages", "stores"}
    assert free_parts(["objective.spans"]) == free_parts(["retrieval"]) == {"settings", "stages"}


def test_a_name_that_can_never_change_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.layers cannot change"):
        check_override(load_config(None, [*BASE, "checkpoint.override=[model.layers]"]))
    check_override(load_config(None, [*BASE, "checkpoint.override=[optimizer.lr, optimizer, data.mixture]"]))


def test_a_section_that_an_older_checkpoint_does_not_know_is_no_change() -> None:
    saved = dataclasses.asdict(load_config(None, BASE))
    del saved["retrieval"]
    assert changes("retrieval.max_score=0.5", saved=saved) == []
