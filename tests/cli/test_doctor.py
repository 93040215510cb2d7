"""The doctor's parts that start processes."""

import subprocess
import sys
from pathlib import Path

from megacm3 import doctor
from megacm3.doctor import OK, PROBLEM

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_add_up() -> None:
    (finding,) = doctor.check_collective()
    assert finding.state == OK, finding.text


def test_a_rank_that_fails_is_a_problem() -> None:
    (finding,) = doctor.check_collective(backend="nonsense")
    assert finding.state == PROBLEM and "exit code 1" in finding.text


def test_the_command_prints_and_leaves_with_its_code(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "doctor.py"), "--no-collective", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "everything needed is there"
