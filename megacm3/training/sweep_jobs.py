"""The trials of a sweep as processes of this machine or as Slurm jobs: a folder, a script, an exit code in a file."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

from megacm3.errors import ConfigError, DataError
from megacm3.files import read_json

SCRIPT, LOG, CODE, JOB = "trial.sh", "trial.log", "exit_code", "job"
LOST_AFTER = 30.0
"""Seconds that a Slurm job may be gone from the queue before its exit code is given up: shared disks are slow."""


def script_of(folder: Path, commands: list[str], overrides: dict[str, Any]) -> str:
    """The shell script of a trial: its commands in order until one fails, then the exit code in a file."""
    given = " ".join(
        shlex.quote(f"{key}={json.dumps(v) if not isinstance(v, str) else v}") for key, v in overrides.items()
    )
    lines = [c.replace("{overrides}", given).replace("{out}", shlex.quote(str(folder))) for c in commands]
    code = shlex.quote(str(folder / CODE))
    body = "\n".join(f"{{ {line}; }} || finish $?" for line in lines)
    return (
        "#!/usr/bin/env bash\n"
        f'finish() {{ echo "$1" >{code}.new && mv {code}.new {code}; exit "$1"; }}\n'
        f"cd {shlex.quote(os.getcwd())} || finish 1\n{body}\nfinish 0\n"
    )


class Jobs:
    """Starts trials and says which have ended."""

    def __init__(self, executor: str, sbatch: list[str]) -> None:
        if executor == "slurm" and not shutil.which("sbatch"):
            raise ConfigError(
                "executor = slurm, but there is no sbatch here; run it on a login node, or executor=local"
            )
        self._slurm, self._sbatch = executor == "slurm", sbatch
        self._processes: dict[Path, subprocess.Popen[bytes]] = {}
        self._gone: dict[Path, float] = {}

    def start(self, folder: Path, commands: list[str], overrides: dict[str, Any]) -> None:
        """Start a trial, or take up one that an earlier sweep started: a Slurm job goes on without us."""
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CODE).is_file() or (self._slurm and (folder / JOB).is_file()):
            return
        if not self._slurm and (folder / JOB).is_file() and _alive(folder / JOB):
            return
        script = folder / SCRIPT
        script.write_text(script_of(folder.resolve(), commands, overrides), encoding="utf-8")
        if not self._slurm:
            with open(folder / LOG, "ab") as log:
                process = subprocess.Popen(["bash", script], stdout=log, stderr=log, start_new_session=True)
            self._processes[folder] = process
            created = psutil.Process(process.pid).create_time()
            (folder / JOB).write_text(f"{process.pid} {created}\n", encoding="utf-8")
            return
        command = ["sbatch", "--parsable", f"--output={folder.resolve() / LOG}", f"--job-name={folder.name}"]
        answer = subprocess.run([*command, *self._sbatch, str(script)], capture_output=True, text=True, check=False)
        if answer.returncode:
            raise ConfigError(f"sbatch refused {folder.name}: {answer.stderr.strip().splitlines()[-1:]}")
        (folder / JOB).write_text(answer.stdout.strip().split(";")[0] + "\n", encoding="utf-8")

    def ended(self, folder: Path) -> bool:
        """Whether a trial's commands are over."""
        if (folder / CODE).is_file():
            return True
        if not self._slurm:
            own = self._processes.get(folder)
            return not _alive(folder / JOB) if own is None else own.poll() is not None
        number = (folder / JOB).read_text(encoding="utf-8").strip()
        queue = subprocess.run(["squeue", "-h", "-j", number, "-o", "%i"], capture_output=True, text=True, check=False)
        if number in queue.stdout.split():
            self._gone.pop(folder, None)
            return False
        return time.monotonic() - self._gone.setdefault(folder, time.monotonic()) > LOST_AFTER

    def failure(self, folder: Path) -> str:
        """Why a trial failed, in one line; empty when it did not."""
        if (folder / CODE).is_file():
            code = (folder / CODE).read_text(encoding="utf-8").strip()
            if code == "0":
                return ""
            told = f"exit code {code}"
        else:
            told = "it ended without an exit code (killed, or out of memory)"
        return f"{told}; {_last_line(folder / LOG)}"

    def stop(self) -> None:
        """End what still runs on this machine, each with its children; the next sweep starts it again."""
        for process in self._processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._processes.values():
            process.wait()


def _alive(job: Path) -> bool:
    """Whether the process that a file names, by number and time of birth, still runs."""
    number, created = job.read_text(encoding="utf-8").split()
    try:
        return psutil.Process(int(number)).create_time() == float(created)
    except psutil.NoSuchProcess:
        return False


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    errors = [line for line in lines if line.startswith("error: ")]
    return next(iter(errors or [line for line in reversed(lines) if line.strip()]), f"{log} is empty").strip()


def read_value(folder: Path, value: str, last: int) -> float:
    """The number that FILE:KEY names below a trial's folder. Raises DataError when it is missing or not finite."""
    name, _, key = value.rpartition(":")
    path = folder / name
    if not path.is_file():
        raise DataError(f"it left no {path}, which value = {value} names")
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        numbers = [line[key] for line in lines[-last:] if line.get(key) is not None]
        if not numbers:
            raise DataError(f"{path} has no {key} in its last {last} lines")
        found = sum(numbers) / len(numbers)
    else:
        found = read_json(path)
        for part in key.split("."):
            if not isinstance(found, dict) or part not in found:
                raise DataError(f"{path} has no {key}")
            found = found[part]
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise DataError(f"{path}: {key} is {found}; expected a finite number")
    return float(found)
