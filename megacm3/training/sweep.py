"""Searches config keys: each trial is a whole run of commands in a folder of its own, kept in a journal by Optuna.

A sweep's file names the commands, the keys and the value to make small or large. The journal, the trials' folders and
their exit codes are all that a stopped sweep needs: the same command asks no trial twice, waits for what still runs,
starts again what was stopped (a trainer resumes from its own checkpoints), and goes on.
"""

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from megacm3.command import seed_from
from megacm3.config import Config
from megacm3.errors import ConfigError, Megacm3Error
from megacm3.files import sha256_json
from megacm3.resolve import check_keys, merge, read_yaml
from megacm3.training.sweep_jobs import Jobs, read_value

POLL = 0.5
"""Seconds between looks at running trials."""


@dataclass
class SweepConfig:
    """A search."""

    out: str = ""
    """Folder of the journal and the trials."""
    commands: list[str] = field(default_factory=list)
    """Shell lines of one trial, in order; {overrides} stands for its key=value pairs, {out} for its folder."""
    keys: dict[str, Any] = field(default_factory=dict)
    """Config key -> list of values, or {low, high} with log: true, step: N or integer: true."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Config key -> value in every trial."""
    value: str = "metrics.jsonl:loss"
    """FILE:KEY below the trial's folder: mean of KEY over the last lines of a .jsonl, or a dotted key of a .json."""
    last: int = 10
    """Lines of a .jsonl that count."""
    direction: str = "minimize"
    """minimize | maximize."""
    sampler: str = "grid"
    """grid (every combination of lists) | tpe | random."""
    trials: int = 0
    """How many in all; 0 = the whole grid."""
    seed: int = 0
    parallel: int = 1
    """Trials at once."""
    executor: str = "local"
    """local | slurm."""
    sbatch: list[str] = field(default_factory=list)
    """Options of sbatch, such as --gpus=8."""


def load_sweep(path: str | Path, overrides: dict[str, Any]) -> SweepConfig:
    """A sweep's YAML file. Raises ConfigError for unknown keys, here or of the trainer's config, and wrong ranges."""
    given = read_yaml(path)
    sections = {key: given.pop(key) for key in ("keys", "fixed") if key in given}
    sweep: SweepConfig = merge(SweepConfig, [(str(path), given), ("command line", overrides)])
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ConfigError(f"{path}: {name} is no mapping of config keys")
        setattr(sweep, name, section)
        check_keys(section, Config, f"{path}: {name}")
    _check(sweep, str(path))
    return sweep


def _check(sweep: SweepConfig, path: str) -> None:
    choices = {
        "direction": ("minimize", "maximize"),
        "sampler": ("grid", "tpe", "random"),
        "executor": ("local", "slurm"),
    }
    for key, allowed in choices.items():
        if getattr(sweep, key) not in allowed:
            raise ConfigError(f"{path}: {key} = '{getattr(sweep, key)}'; expected one of {', '.join(allowed)}")
    for key in ("out", "commands", "keys"):
        if not getattr(sweep, key):
            raise ConfigError(f"{path}: {key} is empty; it is what a sweep is made of")
    if not any("{overrides}" in command for command in sweep.commands):
        raise ConfigError(f"{path}: no command holds {{overrides}}: all trials would be the same")
    if ":" not in sweep.value:
        raise ConfigError(f"{path}: value = '{sweep.value}'; expected FILE:KEY, such as metrics.jsonl:loss_image")
    if sweep.parallel < 1 or (sweep.sampler != "grid" and sweep.trials < 1):
        raise ConfigError(f"{path}: parallel = {sweep.parallel}, trials = {sweep.trials}; expected at least 1")
    for key, spec in sweep.keys.items():
        _distribution(key, spec, path)
        if sweep.sampler == "grid" and not isinstance(spec, list):
            raise ConfigError(f"{path}: keys.{key} is a range; sampler = grid needs lists, or choose tpe or random")


def _distribution(key: str, spec: Any, path: str) -> BaseDistribution:
    if isinstance(spec, list) and spec:
        # Optuna keeps scalars only; lists and mappings travel as text and are put back.
        return CategoricalDistribution([_scalar(value) for value in spec])
    if not isinstance(spec, dict) or not {"low", "high"} <= spec.keys() <= {"low", "high", "log", "step", "integer"}:
        raise ConfigError(f"{path}: keys.{key} = {spec!r}; expected a list of values or {{low, high, log, step}}")
    try:
        if spec.get("integer"):
            step = int(spec.get("step", 1))
            return IntDistribution(int(spec["low"]), int(spec["high"]), bool(spec.get("log")), step)
        return FloatDistribution(float(spec["low"]), float(spec["high"]), bool(spec.get("log")), spec.get("step"))
    except (ValueError, TypeError) as fault:
        raise ConfigError(f"{path}: keys.{key}: {fault}") from fault


def _scalar(value: Any) -> Any:
    if not isinstance(value, list | dict):
        return value
    return json.dumps(value)


@dataclass(frozen=True)
class Outcome:
    """What a sweep found."""

    best: FrozenTrial | None
    failed: list[tuple[int, str]]
    """(trial, why)."""
    done: int


def run_sweep(sweep: SweepConfig, tell: Callable[[str], None]) -> Outcome:
    """Run what is missing of a sweep. `tell` gets a line for each trial that ends. Raises ConfigError for another sweep
    in the same folder."""
    out = Path(sweep.out)
    out.mkdir(parents=True, exist_ok=True)
    study = _study(sweep, out)
    distributions = {key: _distribution(key, spec, "sweep") for key, spec in sweep.keys.items()}
    total = _enqueue(sweep, study)
    jobs = Jobs(sweep.executor, sweep.sbatch)
    running: dict[int, Path] = {}
    try:
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            running[trial.number] = _start(jobs, sweep, out, trial.number, trial.params)
        while True:
            asked = len([t for t in study.get_trials(deepcopy=False) if t.state != TrialState.WAITING])
            while len(running) < sweep.parallel and asked < total:
                new = study.ask(distributions)
                running[new.number] = _start(jobs, sweep, out, new.number, new.params)
                asked += 1
            if not running:
                break
            ended = [number for number, folder in running.items() if jobs.ended(folder)]
            for number in ended:
                tell(_finish(jobs, sweep, study, number, running.pop(number)))
            if not ended:
                time.sleep(POLL)
    finally:
        jobs.stop()
    return _outcome(study)


def _study(sweep: SweepConfig, out: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(out / "journal.log")))
    direction = StudyDirection[sweep.direction.upper()]
    study = optuna.create_study(storage=storage, study_name="sweep", direction=direction, load_if_exists=True)
    # A sampler keeps no state: going on with the same seed would draw the first trials again.
    seed = seed_from("sweep", sweep.seed, len(study.get_trials(deepcopy=False))) & 0x7FFFFFFF
    tpe = sweep.sampler == "tpe"
    study.sampler = optuna.samplers.TPESampler(seed=seed) if tpe else optuna.samplers.RandomSampler(seed=seed)
    searched = {"keys": sweep.keys, "fixed": sweep.fixed, "commands": sweep.commands, "value": sweep.value}
    fingerprint = sha256_json(searched)
    if study.user_attrs.get("sweep", fingerprint) != fingerprint:
        raise ConfigError(f"{out} holds another sweep (keys, fixed, commands or value differ); give another out")
    study.set_user_attr("sweep", fingerprint)
    return study


def _enqueue(sweep: SweepConfig, study: optuna.Study) -> int:
    """Put the grid in line, once; the number of trials in all."""
    if sweep.sampler != "grid":
        return sweep.trials
    grid = [dict(zip(sweep.keys, values, strict=True)) for values in itertools.product(*sweep.keys.values())]
    wanted = grid[: sweep.trials] if sweep.trials else grid
    for values in wanted[len(study.get_trials(deepcopy=False)) :]:
        study.enqueue_trial({key: _scalar(value) for key, value in values.items()})
    return len(wanted)


def _start(jobs: Jobs, sweep: SweepConfig, out: Path, number: int, params: dict[str, Any]) -> Path:
    folder = out / f"trial_{number:04d}"
    jobs.start(folder, sweep.commands, {**sweep.fixed, **params})
    return folder


def _finish(jobs: Jobs, sweep: SweepConfig, study: optuna.Study, number: int, folder: Path) -> str:
    params = study.get_trials(deepcopy=False)[number].params
    told = " ".join(f"{key}={value}" for key, value in params.items())
    try:
        why = jobs.failure(folder)
        value = read_value(folder, sweep.value, sweep.last) if not why else 0.0
    except Megacm3Error as fault:
        why = str(fault)
    if why:
        study.tell(number, state=TrialState.FAIL)
        study.set_user_attr(f"failed {number}", why)
        return f"trial {number} failed ({told}): {why}"
    study.tell(number, value)
    return f"trial {number}: {sweep.value} = {value:.6g} ({told})"


def _outcome(study: optuna.Study) -> Outcome:
    trials = study.get_trials(deepcopy=False)
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    failed = [(t.number, study.user_attrs.get(f"failed {t.number}", "")) for t in trials if t.state == TrialState.FAIL]
    return Outcome(study.best_trial if done else None, failed, len(done))
