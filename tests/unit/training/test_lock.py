"""One job a folder: the living are respected, the dead are not waited for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megacm3.errors import ConfigError
from megacm3.training import lock
from megacm3.training.lock import FolderLock


def test_a_second_job_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    first = FolderLock(tmp_path)
    first.acquire()
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on .*train.out"):
        FolderLock(tmp_path).acquire()
    first.release()
    second = FolderLock(tmp_path)
    second.acquire()
    first.release()  # not its own any more
    assert second.path.exists()
    second.release()
    assert not any(tmp_path.iterdir())


def test_a_dead_process_and_one_with_a_reused_number_are_taken_over(tmp_path: Path) -> None:
    held = FolderLock(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for change in ({"pid": dead.pid}, {"begun": "1"}):  # this process's number, but it began at another time
        held.path.write_text(json.dumps(held._mine | change))
        heir = FolderLock(tmp_path)
        heir.acquire()
        heir.release()
    held.path.write_text("{cut")
    FolderLock(tmp_path).acquire()


def test_another_machine_is_judged_by_its_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "TOUCH", 0.3)
    far = FolderLock(tmp_path)
    far._mine["host"] = "elsewhere"
    far.acquire()  # it touches its file as it would there
    with pytest.raises(ConfigError, match="on elsewhere"):
        FolderLock(tmp_path).acquire()
    far._end.set()  # now it says nothing more
    near = FolderLock(tmp_path)
    near.acquire()
    near.release()
