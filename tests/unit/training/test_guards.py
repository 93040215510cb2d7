"""The guards' arithmetic: spikes, counts over a window, growing norms, ranges left out, state in JSON."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megacm3.config import Config
from megacm3.data.loader import jump
from megacm3.errors import ConfigError
from megacm3.resolve import load_config
from megacm3.training.guards import Guards


def config(*overrides: str) -> Config:
    return load_config(None, ["model.preset=tiny_cm3leon", "train.steps=100", *overrides])


def run(out: Path) -> Any:
    return SimpleNamespace(step=0, is_main=True, out=out)


def after(guards: Guards, losses: list[float]) -> Guards:
    guards.losses = losses
    return guards


def test_a_spike_lies_far_above_the_median_in_robust_deviations() -> None:
    guards = Guards(config("guards.spike=5", "guards.window=40"))
    assert guards.limit == math.inf and not guards.is_spike(1e9)  # too few to say
    losses = [3.0 + 0.01 * (i % 5 - 2) for i in range(20)]
    guards = after(guards, losses)
    assert guards.limit == pytest.approx(3.0 + 5 * 1.4826 * 0.01)
    assert guards.is_spike(3.1) and not guards.is_spike(3.07)
    # One wild value among them moves the limit little: a mean and a standard deviation would let the next one pass.
    wild = after(Guards(config("guards.spike=5", "guards.window=40")), [*losses, 300.0])
    assert wild.is_spike(3.1)


def test_equal_losses_leave_a_margin_and_zero_turns_it_off() -> None:
    assert after(Guards(config("guards.spike=5")), [2.0] * 30).limit == pytest.approx(2.0 + 5 * 1.4826 * 2e-3)
    assert after(Guards(config("guards.spike=0")), [2.0] * 30).limit == math.inf


def test_state_goes_through_json_and_keeps_what_was_left_out_since() -> None:
    guards = Guards(config())
    guards.losses, guards.refused, guards.left_out, guards.lowest = [1.0, 2.0], [7], [[8, 16]], 3.0
    saved = json.loads(json.dumps(guards.state()))
    other = Guards(config())
    other.left_out, other.refused = [[24, 32]], [9]
    other.restore(saved)
    assert other.left_out == [[8, 16], [24, 32]] and other.refused == [7, 9]
    assert other.losses == [1.0, 2.0] and other.lowest == 3.0


def test_what_was_saved_does_not_change_with_the_steps_after_it(tmp_path: Path) -> None:
    """A save in the background writes its state when the training is further on."""
    guards = Guards(config("guards.output_norm=2", "optimizer.schedule.warmup=0"))
    guards._watch_norm(run(tmp_path), 1, 3.0)
    saved = guards.state()
    guards._watch_norm(run(tmp_path), 2, 4.0)
    assert saved["norms"] == [3.0]


def test_a_step_refused_again_after_each_rollback_counts_each_time() -> None:
    """Else a fault that stays would be rolled back for ever, and guards.limit never reached."""
    guards = Guards(config())
    saved = guards.state()
    for times in (1, 2, 3):
        guards.refused.append(5)
        guards.restore(saved)
        assert guards.refused == [5] * times
    guards.restore({**saved, "refused": [2, 5]})  # it was saved before, by the same run
    assert guards.refused == [2, 5, 5, 5]


def test_a_growing_output_norm_warns_once_a_doubling(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guards = Guards(config("guards.window=8", "guards.output_norm=2", "optimizer.schedule.warmup=4"))
    for step, norm in enumerate([9.0] * 4 + [1.0] * 8 + [1.9] * 8 + [2.5] * 8 + [2.6] * 8 + [5.2] * 8, start=1):
        guards._watch_norm(run(tmp_path), step, norm)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2 and "step 28: the output norm is 2.5" in warnings[0] and "step 44" in warnings[1]


def test_batches_jump_over_ranges_of_sequences() -> None:
    ranges = [[20, 30], [8, 10]]
    assert jump(0, 8, ranges) == 0
    assert jump(8, 8, ranges) == 10  # touches the first range; 10..17 is free
    assert jump(5, 8, ranges) == 10
    assert jump(13, 8, ranges) == 30
    assert jump(12, 8, ranges) == 12


@pytest.mark.parametrize("key", ["checkpoint.keep", "checkpoint.every", "train.stop_at", "data.workers"])
def test_counts_below_zero_are_refused(key: str) -> None:
    """To keep -1 checkpoints would delete all but the newest."""
    with pytest.raises(ConfigError, match=f"{key} = -1; expected 0 or more"):
        config(f"{key}=-1")


def test_ranges_must_be_ranges() -> None:
    for text in ("[[4]]", "[[4,4]]", "[[9,3]]", "[[-1,3]]"):
        with pytest.raises(ConfigError, match=r"guards.skip_sequences: .* is no range"):
            config(f"guards.skip_sequences={text}")
    assert Guards(config("guards.skip_steps=[[4,6]]")).leaves_out(5)
    assert not Guards(config("guards.skip_steps=[[4,6]]")).leaves_out(6)
