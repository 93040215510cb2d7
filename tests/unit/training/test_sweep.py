"""Sweeps over real shell commands: grids, ranges, a failed trial, a stop and a second start, and Slurm's programs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("optuna", reason="the extra sweep")

from megacm3.errors import ConfigError
from megacm3.training.sweep import Outcome, load_sweep, run_sweep

ROOT = Path(__file__).resolve().parents[3]
# The trial's value: (lr - 3)^2 + micro_batch; it fails where micro_batch is 8.
SCORE = """
import json, sys
given = dict(pair.split("=", 1) for pair in sys.argv[2:])
assert given["train.micro_batch"] != "8", "out of memory"
value = (float(given["optimizer.lr"]) - 3) ** 2 + int(given["train.micro_batch"])
with open(sys.argv[1] + "/metrics.jsonl", "a") as out:
    for step in range(20):
        print(json.dumps({"step": step, "loss": 100.0 if step < 10 else value}), file=out)
"""


def sweep_file(folder: Path, **keys: Any) -> Path:
    """A grid of 3 x 3 with a failing column."""
    (folder / "score.py").write_text(SCORE)
    tree = {
        "out": str(folder / "out"),
        "commands": [f"echo {{out}} >>{folder}/started", f"{sys.executable} {folder}/score.py {{out}} {{overrides}}"],
        "keys": {"optimizer.lr": [1.0, 2.0, 4.5], "train.micro_batch": [1, 2, 8]},
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree | keys))
    return path


def searched(path: Path, **overrides: Any) -> tuple[Outcome, list[str]]:
    lines: list[str] = []
    return run_sweep(load_sweep(path, overrides), lines.append), lines


def test_a_grid_runs_whole_names_failures_and_finds_the_best(tmp_path: Path) -> None:
    found, lines = searched(sweep_file(tmp_path), parallel=3)
    assert found.done == 6 and len(found.failed) == 3 and len(lines) == 9
    assert found.best is not None and found.best.value == 2.0
    assert found.best.params == {"optimizer.lr": 2.0, "train.micro_batch": 1}
    assert all("exit code 1" in why and "out of memory" in why for _, why in found.failed)
    assert sum("failed (optimizer.lr=" in line and "train.micro_batch=8" in line for line in lines) == 3
    # A second call finds everything done and starts nothing.
    again, lines = searched(tmp_path / "sweep.yaml")
    assert again == found and lines == [] and len((tmp_path / "started").read_text().splitlines()) == 9


def test_what_was_stopped_goes_on_and_nothing_runs_twice(tmp_path: Path) -> None:
    path = sweep_file(tmp_path)
    slow = yaml.safe_load(path.read_text())
    slow["commands"].insert(1, "sleep 0.7")
    path.write_text(yaml.safe_dump(slow))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tools/sweep.py", str(path), "parallel=2"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # one trial has ended
    process.send_signal(signal.SIGKILL)  # the running trials live on without it
    process.wait()
    found, _ = searched(path, parallel=2)
    assert found.done == 6 and len(found.failed) == 3
    started = (tmp_path / "started").read_text().splitlines()
    assert len(started) == 9 == len(set(started)), started


def test_a_trial_that_was_ended_is_started_again(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, keys={"optimizer.lr": [1.0], "train.micro_batch": [1]})
    tree = yaml.safe_load(path.read_text())
    tree["commands"].insert(1, f"[ -e {tmp_path}/go ] || sleep 60")
    path.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "tools/sweep.py", str(path)]
    # What runs in the background of a shell without job control has Ctrl-C ignored, and so have its children.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 75, errors
    assert not (tmp_path / "out/trial_0000/exit_code").exists()
    (tmp_path / "go").touch()
    found, _ = searched(path)
    assert found.done == 1 and len((tmp_path / "started").read_text().splitlines()) == 2


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_ranges_are_searched_and_kept_to(sampler: str, tmp_path: Path) -> None:
    keys = {
        "optimizer.lr": {"low": 1.0e-5, "high": 1.0, "log": True},
        "train.micro_batch": {"low": 1, "high": 4, "integer": True},
    }
    path = sweep_file(tmp_path, keys=keys, sampler=sampler, trials=3)
    first, _ = searched(path)
    more, lines = searched(path, trials=6)
    assert first.done == 3 and more.done == 6 and len(lines) == 3
    values = [line.split("optimizer.lr=")[1].split()[0] for line in lines]
    assert len(set(values)) == 3 and all(1e-5 <= float(value) <= 1 for value in values)
    drawn = {folder.name: (folder / "trial.sh").read_text() for folder in (tmp_path / "out").glob("trial_*")}
    assert len(set(drawn.values())) == 6


SBATCH = """#!/bin/bash
echo "$@" >> "$SLURM_FAKE/calls"
number=$(wc -l < "$SLURM_FAKE/calls")
for word in "$@"; do case "$word" in --output=*) log="${word#--output=}" ;; *) script="$word" ;; esac; done
if ! grep -q "lr=2.0" "$script"; then
  (echo $number >> "$SLURM_FAKE/queue"; bash "$script" > "$log" 2>&1; sed -i "/^$number$/d" "$SLURM_FAKE/queue") &
fi
echo "$number;cluster"
"""


def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs end by their exit codes; one that vanishes without any is given up and named."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"sbatch": SBATCH, "squeue": '#!/bin/bash\ncat "$SLURM_FAKE/queue" 2>/dev/null\n'}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_FAKE", str(tmp_path))
    monkeypatch.setattr("megacm3.training.sweep_jobs.LOST_AFTER", 1.0)
    path = sweep_file(tmp_path, keys={"optimizer.lr": [1.0, 2.0, 4.5], "train.micro_batch": [1]})
    found, _ = searched(path, executor="slurm", parallel=3, sbatch=["--gpus=8", "--time=1:00:00"])
    assert found.done == 2 and found.best is not None and found.best.params["optimizer.lr"] == 4.5
    ((number, why),) = found.failed
    assert number == 1 and "without an exit code" in why
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 3 and all("--parsable" in call and "--gpus=8 --time=1:00:00" in call for call in calls)


def test_what_is_wrong_is_said_before_anything_runs(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"keys": {"optimizer.rl": [1]}}, "optimizer.rl"),
        ({"keys": {"optimizer.lr": {"low": 1}}}, "keys.optimizer.lr"),
        ({"keys": {"optimizer.lr": {"low": 1.0, "high": 2.0}}}, "sampler = grid needs lists"),
        ({"keys": {"optimizer.lr": {"low": 3.0, "high": 2.0}}, "sampler": "tpe", "trials": 1}, "keys.optimizer.lr"),
        ({"sampler": "tpe"}, "trials = 0"),
        ({"sampler": "best"}, "'best'"),
        ({"commands": ["true"]}, "{overrides}"),
        ({"value": "loss"}, "FILE:KEY"),
        ({"smapler": "tpe"}, "sampler"),
    ]
    for keys, words in wrong:
        with pytest.raises(ConfigError) as caught:
            load_sweep(sweep_file(tmp_path, **keys), {})
        assert words in str(caught.value), str(caught.value)
    with pytest.raises(ConfigError, match="sbatch"):
        searched(sweep_file(tmp_path), executor="slurm")
    assert not (tmp_path / "started").exists()


def test_another_sweep_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    keys = {"optimizer.lr": [1.0], "train.micro_batch": [1]}
    searched(sweep_file(tmp_path, keys=keys))
    with pytest.raises(ConfigError, match="another sweep"):
        searched(sweep_file(tmp_path, keys=keys | {"optimizer.lr": [2.0]}))


def test_a_value_that_is_missing_or_not_a_number_fails_the_trial(tmp_path: Path) -> None:
    keys = {"optimizer.lr": [1.0], "train.micro_batch": [1]}
    found, _ = searched(sweep_file(tmp_path, keys=keys, value="metrics.jsonl:loss_image"))
    assert found.best is None and "no loss_image" in found.failed[0][1]
    report = 'echo \'{"image": {"loss": NaN}}\' >{out}/report.json; : {overrides}'
    nan = sweep_file(tmp_path, keys=keys, out=str(tmp_path / "nan"), value="report.json:image.loss", commands=[report])
    found, _ = searched(nan)
    assert found.best is None and "nan" in found.failed[0][1]
    assert json.loads((tmp_path / "nan/trial_0000/report.json").read_text())
