"""Signals: one rank's stops all, once, after a save; a second one leaves at once and harms nothing."""

import signal
import time
from pathlib import Path

import pytest

from megacm3.checkpoint.commit import discover, leftovers
from tests.helpers.ranks import errors, make_config, start

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_config(tmp_path_factory.mktemp("signals"))


def steps(out: Path) -> list[str]:
    return [path.name for path in discover(out / "checkpoints")]


def test_a_signal_to_one_rank_in_a_step_saves_once_everywhere(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = start(config, out, "checkpoint.every=0", "data.workers=1", fault="output:rank=1:step=3:module=1:sigterm")
    codes, said = job.wait()
    assert codes == [75, 75], said
    assert steps(out) == ["step_000003"] and not leftovers(out / "checkpoints")
    (error,) = errors(said)
    assert "stopped by a signal at step 3, saved" in error


def test_a_signal_during_a_save_lets_it_end_first(config: Path, tmp_path: Path) -> None:
    out, slow = tmp_path / "run", "save.writing:rank=1:step=2:sleep=0.2"
    fault = f"save.before_write:rank=0:step=2:sigterm;save.before_write:rank=1:step=2:sigterm;{slow}"
    codes, said = start(config, out, fault=fault).wait()
    assert codes == [75, 75], said
    assert steps(out)[-1] == "step_000002" and len(steps(out)) == 2 and not leftovers(out / "checkpoints")


def test_a_second_signal_leaves_at_once(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = start(config, out, fault="output:rank=1:step=3:module=1:sleep=1000")
    until = time.monotonic() + 90
    while time.monotonic() < until and not steps(out):
        time.sleep(0.2)
    time.sleep(1.0)
    for _ in range(2):
        job.processes[0].send_signal(signal.SIGTERM)
        time.sleep(0.5)
    codes, said = job.wait(20)
    assert codes == [75, 75], said
    assert steps(out) == ["step_000002"]
