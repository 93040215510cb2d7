"""Units: finished ones are kept, unfinished ones leave nothing, and no number of workers changes a byte."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from megacm3.data.executors import ExecutorOptions
from megacm3.errors import ConfigError, DataError
from megacm3.files import new_file, read_manifest
from megacm3.retrieval.jobs import Job
from megacm3.retrieval.options import BankOptions, NeighbourOptions
from megacm3.retrieval.units import run_unit, run_units, unit_done
from tests.unit.retrieval.conftest import same_bytes

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Squares:
    """Unit N writes N squared; one of them may fail, sleep or be killed."""

    count: int = 4
    broken: int = -1
    sleepy: int = -1
    killed: int = -1
    stage: str = "squares"

    def make(self, folder: Path, number: int) -> list[Path]:
        path = folder / "squares" / f"{number}.txt"
        with new_file(path) as temporary:
            temporary.write_text(str(number))
            if number == self.broken:
                raise DataError(f"unit {number} is broken")
            if number == self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            if number == self.sleepy:
                time.sleep(60)
            temporary.write_text(str(number**2))
        return [path]


def job(folder: Path, **settings: object) -> Job:
    return Job(folder / "out", "bank", {"size": 4} | settings, {"store": "abc"})


def finish(made: Job, units: Squares, workers: int = 1) -> None:
    made.prepare()
    run_units(units, made.work, workers)
    made.commit({"count": units.count})


def test_a_job_leaves_its_folder_and_nothing_else(tmp_path):
    finish(job(tmp_path), Squares())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [(tmp_path / "out" / "squares" / f"{n}.txt").read_text() for n in range(4)] == ["0", "1", "4", "9"]
    manifest = read_manifest(tmp_path / "out", "bank", verify="sha256")
    assert manifest.settings == {"count": 4, "job": {"size": 4}} and len(manifest.files) == 4


def test_a_failed_unit_keeps_the_others_and_the_next_run_goes_on(tmp_path):
    made = job(tmp_path)
    made.prepare()
    with pytest.raises(DataError, match="unit 2 is broken"):
        run_units(Squares(broken=2), made.work)
    assert not made.output.exists()
    assert [unit_done(made.work, "squares", n) for n in range(4)] == [True, True, False, False]
    assert not (made.folder / "squares" / "2.txt").exists()
    before = (made.folder / "squares" / "1.txt").stat().st_mtime_ns
    made.prepare()
    assert run_units(Squares(), made.work) == 2
    assert (made.folder / "squares" / "1.txt").stat().st_mtime_ns == before
    made.commit({"count": 4})
    finish(job(tmp_path / "fresh"), Squares())
    assert same_bytes(tmp_path / "out", tmp_path / "fresh" / "out")


def test_a_file_that_is_gone_or_short_is_made_again(tmp_path):
    made = job(tmp_path)
    made.prepare()
    run_units(Squares(), made.work)
    (made.folder / "squares" / "3.txt").unlink()
    (made.folder / "squares" / "2.txt").write_text("")
    assert run_units(Squares(), made.work) == 2
    assert (made.folder / "squares" / "2.txt").read_text() == "4"


def test_a_killed_process_leaves_work_that_goes_on(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tests.unit.retrieval.test_units import *;"
        "made = job(Path(sys.argv[1])); made.prepare(); run_units(Squares(sleepy=2), made.work)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stderr=subprocess.DEVNULL)
    made = job(tmp_path)
    for _ in range(1200):
        if list((made.folder / "squares").glob(".2.txt*")) if made.folder.is_dir() else False:
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list((made.folder / "squares").glob(".2.txt*")) and not made.output.exists()
    made.prepare()
    assert run_units(Squares(), made.work) == 2
    made.commit({"count": 4})
    finish(job(tmp_path / "fresh"), Squares())
    assert same_bytes(tmp_path / "out", tmp_path / "fresh" / "out")


def test_units_in_any_order_give_the_same_folder(tmp_path):
    made = job(tmp_path)
    made.prepare()
    for number in (3, 1, 0, 2):
        run_unit(Squares(), made.work, number)
    made.commit({"count": 4})
    finish(job(tmp_path / "fresh"), Squares())
    assert same_bytes(tmp_path / "out", tmp_path / "fresh" / "out")


def test_a_finished_job_is_known_and_another_one_is_refused(tmp_path):
    finish(job(tmp_path), Squares())
    assert job(tmp_path).finished() is not None
    with pytest.raises(DataError, match=r"size = 4 then, 5 now.*--overwrite"):
        job(tmp_path, size=5).finished()
    with pytest.raises(DataError, match="another store"):
        Job(tmp_path / "out", "bank", {"size": 4}, {"store": "xyz"}).finished()
    assert job(tmp_path, size=5).finished(overwrite=True) is None
    assert job(tmp_path / "elsewhere").finished() is None


def test_unfinished_work_of_another_job_is_refused_or_discarded(tmp_path):
    made = job(tmp_path)
    made.prepare()
    run_unit(Squares(), made.work, 0)
    other = job(tmp_path, size=5)
    with pytest.raises(DataError, match="unfinished work made with size = 4 then, 5 now"):
        other.prepare()
    other.prepare(overwrite=True)
    assert not unit_done(other.work, "squares", 0)
    # Nothing was finished: nothing to ask about.
    made.prepare()


def test_two_runs_on_one_folder_are_refused(tmp_path):
    made, other = job(tmp_path), job(tmp_path)
    with made.alone():
        with pytest.raises(DataError, match="another process is at work"), other.alone():
            pass
        finish(made, Squares(), 1)
    assert not made.work.exists()
    with other.alone():
        assert other.finished() is not None
    assert not made.work.exists()


def test_a_lock_whose_holder_was_killed_is_free(tmp_path):
    made = job(tmp_path)
    code = (
        "import os, sys; from pathlib import Path; from tests.unit.retrieval.test_units import job\n"
        "made = job(Path(sys.argv[1])); lock = made.alone(); lock.__enter__(); made.prepare(); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False, timeout=120)
    assert (made.work / "lock").is_file()
    with made.alone():
        finish(made, Squares(), 1)
    assert made.output.is_dir() and not made.work.exists()


def test_folders_that_are_in_the_way_are_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("dear")
    with pytest.raises(DataError, match="no folder of kind 'bank'"):
        job(tmp_path).finished(overwrite=True)
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "mine.txt").write_text("dear")
    with pytest.raises(DataError, match="in the way"):
        job(tmp_path).prepare(overwrite=True)
    assert (tmp_path / "out.work" / "mine.txt").is_file()


def test_a_negative_number_of_workers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--workers -1"):
        run_units(Squares(), tmp_path, -1)


@pytest.mark.long
def test_several_workers_give_the_same_bytes_and_pass_errors_on(tmp_path):
    finish(job(tmp_path / "one"), Squares(), 1)
    finish(job(tmp_path / "three"), Squares(), 3)
    assert same_bytes(tmp_path / "one" / "out", tmp_path / "three" / "out")
    made = job(tmp_path / "broken")
    made.prepare()
    with pytest.raises(DataError, match="unit 1 is broken"):
        run_units(Squares(broken=1), made.work, 2)
    run_units(Squares(), made.work, 2)
    (made.folder / "squares" / ".2.txt.1.tmp").write_text("2")  # by a worker that was killed
    made.commit({"count": 4})
    assert same_bytes(tmp_path / "one" / "out", tmp_path / "broken" / "out")


def test_a_killed_worker_is_an_error_not_a_wait(tmp_path):
    made = job(tmp_path)
    made.prepare()
    with pytest.raises(DataError, match="a worker was killed"):
        run_units(Squares(killed=1), made.work, 2)
    finish(made, Squares(), 2)
    finish(job(tmp_path / "one"), Squares(), 1)
    assert same_bytes(tmp_path / "out", tmp_path / "one" / "out")


SBATCH = """#!/bin/bash
# Runs a job script here and now, one array task after the other, as a Slurm of one node would.
script="${@: -1}"
echo "$@" >> "$SLURM_FAKE/calls"
cp "$script" "$SLURM_FAKE/script.sh"
tasks=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
if ! grep -q merge_stats "$script"; then
  for task in $(seq 0 "$tasks"); do
    RUN_OFFSET=0 SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=here bash "$script" > "$SLURM_FAKE/task-$task.log" 2>&1
  done
fi
echo "Submitted batch job 42"
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """Slurm's programs as scripts that run a job on this machine; `queue` is what squeue shows."""
    folder = tmp_path / "slurm"
    (folder / "bin").mkdir(parents=True)
    programs = {"sbatch": SBATCH, "srun": '#!/bin/bash\nshift 3\nexec "$@"\n', "scontrol": "#!/bin/bash\necho here\n"}
    programs["squeue"] = "#!/bin/bash\ncat $SLURM_FAKE/queue\n: > $SLURM_FAKE/queue\n"
    for name, text in programs.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "queue").write_text("")
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_FAKE", str(folder))
    monkeypatch.setattr("megacm3.retrieval.units._POLL_SECONDS", 0.1)
    return folder


@pytest.mark.long
def test_units_run_under_slurm_and_are_waited_for(tmp_path, slurm):
    finish(job(tmp_path / "here"), Squares())
    where = ExecutorOptions("slurm", workers=2, slurm={"partition": "cpu", "account": "me"})
    made = job(tmp_path / "there")
    made.prepare()
    run_unit(Squares(), made.work, 1)
    assert run_units(Squares(), made.work, 0, where) == 3
    made.commit({"count": 4})
    assert same_bytes(tmp_path / "here" / "out", tmp_path / "there" / "out")
    script = (slurm / "script.sh").read_text()
    for line in ("--partition=cpu", "--account=me", "--job-name=squares-out"):
        assert line in script, script


@pytest.mark.long
def test_a_job_in_the_queue_is_not_handed_in_twice(tmp_path, slurm):
    where = ExecutorOptions("slurm", slurm={"partition": "cpu"})
    made = job(tmp_path / "there")
    made.prepare()
    (made.work / "submitted.json").write_text('{"job": 42}')
    (slurm / "queue").write_text("42 cpu squares R\n")
    # It leaves the queue and its units are not there: said, with what to do.
    with pytest.raises(DataError, match="4 of 4 units of squares failed under slurm"):
        run_units(Squares(), made.work, 0, where)
    assert not (slurm / "calls").exists()
    with pytest.raises(DataError, match="1 of 4 units of squares failed under slurm"):
        run_units(Squares(broken=2), made.work, 0, where)
    assert run_units(Squares(), made.work, 0, where) == 1


@pytest.mark.long
def test_units_run_under_ray(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="the package ray (extra `ray`) is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    made = job(tmp_path / "there")
    made.prepare()
    try:
        assert run_units(Squares(), made.work, 0, ExecutorOptions("ray", workers=2)) == 4
    finally:
        ray.shutdown()


def test_an_executor_that_is_not_here_is_refused():
    with pytest.raises(ConfigError, match="--slurm partition=NAME"):
        BankOptions("store", "encoder", "bank", ("x",), executor="slurm").where.check()
    with pytest.raises(ConfigError, match="expected local, slurm or ray"):
        NeighbourOptions("bank", "out", executor="spark").check()
