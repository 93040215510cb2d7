"""The shell recipes, run: one machine under the deepspeed launcher, and Slurm's script with a stand-in for srun."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from megacm3.presets import PRESETS
from tests.helpers.stores import make_store

ROOT = Path(__file__).resolve().parents[2]
SRUN = """#!/usr/bin/env bash
# Starts the tasks of a step on this machine, and passes signals on, as srun does.
shift # --wait=60
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
  tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
highest=0
for task in "${tasks[@]}"; do
  while true; do
    code=0
    wait "$task" || code=$?
    kill -0 "$task" 2>/dev/null || break
  done
  ((code > highest)) && highest=$code
done
exit "$highest"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ "$1" == show ]]; then echo 127.0.0.1; else echo "$@" >>"$SCONTROL_LOG"; fi
"""


def plain(text: str) -> str:
    """With single spaces."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of seconds over a small store."""
    folder = tmp_path_factory.mktemp("recipes")
    store = make_store(folder / "store", documents=64, text_size=256, codebook_size=128, image_tokens=16)
    path = folder / "config.yaml"
    path.write_text(
        f"""
model: {{preset: tiny_cm3leon, vocab_size: 512, sequence_length: 96}}
deepspeed: {ROOT}/ds_configs/zero1.json
data: {{mixture: [{{store: {store}}}], packing: whole}}
train: {{steps: 100000, micro_batch: 2, global_batch: 4, dtype: fp32, device: cpu}}
checkpoint: {{every: 0}}
log: {{every: 1, tensorboard: false}}
""",
        encoding="utf-8",
    )
    return path


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def stop_after_the_first_step(process: subprocess.Popen[str], out: Path) -> str:
    """SIGTERM to the script once training runs; returns all that it printed."""
    while not (out / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    return printed


def last_step(out: Path) -> int:
    steps = [path.parent.name for path in (out / "checkpoints").glob("step_*/manifest.json")]
    return max(int(name.removeprefix("step_")) for name in steps)


@pytest.mark.long
def test_one_machine_a_signal_and_the_same_command_again(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["bash", str(ROOT / "examples" / "pretrain.sh"), str(config), f"train.out={out}"]
    with subprocess.Popen(
        command, env=environment(RANKS="2"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        printed = stop_after_the_first_step(process, out)
    assert process.returncode == 75, printed
    reached = last_step(out)
    again = subprocess.run(
        [*command, f"train.stop_at={reached + 2}", "checkpoint.resume=required"],
        env=environment(RANKS="2"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert again.returncode == 0, again.stderr
    assert last_step(out) == reached + 2


@pytest.mark.long
@pytest.mark.parametrize("delay", [0.0, 0.01, 2.0])
def test_one_machine_a_signal_before_there_are_ranks_is_not_lost(delay: float, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["bash", str(ROOT / "examples" / "pretrain.sh"), str(config), f"train.out={out}", "train.steps=100000"]
    with subprocess.Popen(
        command, env=environment(RANKS="2"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            while not any(
                p.info["ppid"] == process.pid and {"setsid", "--module"} & {*(p.info["cmdline"] or ())}
                for p in psutil.process_iter(["ppid", "cmdline"])
            ):
                time.sleep(0.001)
            time.sleep(delay)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=120)
        finally:
            for left in psutil.process_iter(["cmdline"]):
                if f"train.out={out}" in (left.info["cmdline"] or ()):
                    left.kill()
    assert process.returncode != 0 and not (out / "metrics.jsonl").exists()


def test_a_signal_while_the_job_ends_does_not_hide_its_exit_code(tmp_path: Path) -> None:
    """The signal's handler is still running when the ranks have saved and left."""
    script = f"""
source {ROOT}/examples/launch.sh
_stop_ranks() {{ sleep 1; }}
launch_command() {{ launch_words=(bash -c 'sleep 0.6; exit 75'); }}
(sleep 0.3; kill -TERM $$) &
launch 1
echo "code $? stopped $launch_stopped"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, env=environment())
    assert done.stdout == "code 75 stopped 1\n", done


def ranks_of(script: int) -> list[psutil.Process]:
    """The trainer's ranks below a script; their loader processes, which have the same words, are left out."""
    below = psutil.Process(script).children(recursive=True)
    named = [process for process in below if any(word.startswith("--local_rank=") for word in process.cmdline())]
    return [process for process in named if process.ppid() not in {p.pid for p in named}]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_one_machine_a_lost_and_a_stopped_rank_are_started_again(config: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log.txt"
    keys = [f"train.out={out}", "checkpoint.every=5", "train.stop_at=60", "data.workers=1"]
    command = ["bash", str(ROOT / "examples" / "pretrain.sh"), str(config), *keys]
    with (
        log.open("w") as printed,
        subprocess.Popen(
            command, env=environment(RANKS="2", RESTARTS="3"), stdout=printed, stderr=subprocess.STDOUT
        ) as process,
    ):
        for start, number in ((1, signal.SIGKILL), (2, signal.SIGTERM)):
            until = time.monotonic() + 240
            while log.read_text().count("step_0000") < start or not ranks_of(process.pid):
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.1)
            ranks_of(process.pid)[1].send_signal(number)
            while f"start {start + 1} of at most 4" not in log.read_text():
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.1)
        assert process.wait(timeout=240) == 0, log.read_text()
    said = log.read_text()
    assert "exit code 75: start 3 of at most 4" in said and last_step(out) == 60


@pytest.mark.long
@pytest.mark.timeout(600)
def test_one_machine_a_stalled_rank_is_started_again(config: Path, tmp_path: Path) -> None:
    """Rank 0 hangs once step 5 is committed, as on a dead mount: every rank leaves with 6; the job goes on from 5."""
    out = tmp_path / "run"
    keys = [f"train.out={out}", "checkpoint.every=5", "train.stop_at=8", "watchdog.timeout=20"]
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "pretrain.sh"), str(config), *keys],
        env=environment(RANKS="2", RESTARTS="1", MEGACM3_FAULT="save.before_pointer:step=5:sleep=1000"),
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert done.returncode == 0, done.stderr
    assert "exit code 6: start 2 of at most 2" in done.stderr and last_step(out) == 8
    assert "error: rank 0 (" in done.stderr and "in save of step 6 for 2" in done.stderr, done.stderr


def test_one_machine_a_config_error_is_not_tried_again(config: Path) -> None:
    command = ["bash", str(ROOT / "examples" / "pretrain.sh"), str(config), "train.stepz=3"]
    done = subprocess.run(command, env=environment(RANKS="2"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "train.stepz" in done.stderr and "start 2" not in done.stderr


@pytest.mark.long
def test_slurm_a_signal_puts_the_job_back_into_the_queue(config: Path, tmp_path: Path) -> None:
    programs, out, log = tmp_path / "bin", tmp_path / "run", tmp_path / "scontrol.txt"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
    script = ROOT / "examples" / "pretrain.sbatch"
    with subprocess.Popen(
        ["bash", str(script), str(config), f"train.out={out}"],
        env=environment(PATH=f"{programs}:{os.environ['PATH']}", SCONTROL_LOG=str(log), **slurm),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        while not (out / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.2)
        # Slurm signals the job's steps, not its script.
        for step in psutil.Process(process.pid).children():
            step.terminate()
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert log.read_text() == "requeue 12345\n"
    assert last_step(out) >= 1


REAL = [name for name in PRESETS if not name.startswith("tiny_")]
GPUS = {"chameleon_34b": 32}
"""Of the smallest launch that a config's first line names; 8 for the others."""


def dry_run(script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "examples" / script), *arguments],
        env=environment(DRY_RUN="1", **more),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n != REAL[0] else ()) for n in REAL])
def test_each_preset_on_one_machine_and_on_slurm_as_it_would_start(name: str) -> None:
    config, gpus = f"examples/configs/{name}.yaml", str(GPUS.get(name, 8))
    here = dry_run("pretrain.sh", config, RANKS=gpus)
    slurm = dry_run("pretrain.sbatch", config, SLURM_NTASKS=gpus)
    for done in (here, slurm):
        assert done.returncode == 0, done.stderr
        assert f"model {name}, bf16" in plain(done.stdout) and f"ranks {gpus}: tensor" in plain(done.stdout)
        assert f"out runs/{name}" in plain(done.stdout)
    assert f"start   deepspeed -q --num_gpus {gpus} " in here.stdout and f"megacm3.train {config}" in here.stdout
    assert "again   after exit codes 6, 75" in here.stdout
    assert not (ROOT / "runs" / name).exists()


def test_a_hostfile_counts_the_machines_and_a_wrong_number_of_gpus_is_refused() -> None:
    many = dry_run("pretrain.sh", "examples/configs/chameleon_34b.yaml", HOSTFILE="examples/hostfile")
    assert many.returncode == 0, many.stderr
    assert "ranks 32: tensor 8" in plain(many.stdout) and "--hostfile examples/hostfile" in many.stdout
    wrong = dry_run("pretrain.sh", "examples/configs/chameleon_34b.yaml", RANKS="12")
    assert wrong.returncode == 2 and "12 processes cannot be cut" in wrong.stderr and "start" not in wrong.stdout
