"""One job a folder: the living are respected, the dead are not waited for."""

import json
import os
import subprocess
import sys
import threading
import time
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


def test_a_file_system_that_fails_for_a_moment_does_not_end_the_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "TOUCH", 0.05)
    held = FolderLock(tmp_path)
    held.acquire()
    text = held.path.read_text()
    held.path.unlink()
    held.path.mkdir()  # what reads it meets an OSError
    time.sleep(0.3)
    held.path.rmdir()
    held.path.write_text(text)
    os.utime(held.path, (1, 1))
    time.sleep(0.3)
    assert held.path.stat().st_mtime > 1
    held.release()


def test_two_heirs_of_a_dead_machine_do_not_both_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both wait for a sign of life, and the slower one must not take what the faster one has just made its own."""
    monkeypatch.setattr(lock, "TOUCH", 0.1)
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "begun": "1", "token": "dead"}))
    heirs, refused = [FolderLock(tmp_path) for _ in range(2)], []
    begun = threading.Barrier(2)

    def inherit(heir: FolderLock) -> None:
        begun.wait()
        try:
            heir.acquire()
        except ConfigError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=inherit, args=(heir,)) for heir in heirs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 1 and "in use by process" in refused[0]
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_giving_back_what_cannot_be_read_hides_no_other_error(tmp_path: Path) -> None:
    held = FolderLock(tmp_path)
    held.acquire()
    held.path.unlink()
    held.path.mkdir()
    held.release()
