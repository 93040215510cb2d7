"""Where the units of pretokenization run: on this machine, under Slurm or under Ray, by datatrove's executors."""

import functools
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import loguru
from datatrove.pipeline.base import PipelineStep

from megacm3.data.parts import read_part
from megacm3.data.sources import Shard
from megacm3.data.units import ShardFault, UnitRunner, UnitSettings, write_fault
from megacm3.errors import ConfigError, DataError
from megacm3.files import new_file, read_json, write_json
from megacm3.tokenizers.image import ImageTokenizer
from megacm3.tokenizers.text import TextTokenizer

# Every unit would log a dozen lines of datatrove's own; faults come back as exceptions and through `failed/`.
loguru.logger.disable("datatrove")

_SLOW_IMPORTS = (
    "megacm3.silent",
    "torch",
    "diffusers.models.autoencoders.vq_model",
    "webdataset.tariterators",
    "pyarrow.parquet",
    "pandas",
)
"""What a worker needs and takes seconds to import (pandas: pyarrow, for its first table); silent comes first."""
_SLURM_DEFAULTS = {"time": "24:00:00", "cpus_per_task": "1", "mem_per_cpu_gb": "4", "qos": ""}


@dataclass(frozen=True)
class ExecutorOptions:
    """Where and how many at once; nothing here changes the result."""

    executor: str = "local"
    """local, slurm or ray."""
    workers: int = 0
    """Units at once; 0 for one a CPU core, or one a GPU with device = cuda."""
    threads: int = 0
    """Threads that decode pictures, in each worker; 0 for a share of the cores."""
    device: str = "cpu"
    """Where pictures are encoded: cpu, cuda (each worker its own GPU) or cuda:N."""
    slurm: dict[str, str] = field(default_factory=dict)
    """partition, time, cpus_per_task, mem_per_cpu_gb, qos, and further sbatch options by name."""

    def check(self) -> None:
        """Raises ConfigError for values that are none, and for an executor that is not installed here."""
        if self.executor not in ("local", "slurm", "ray"):
            raise ConfigError(f"--executor {self.executor}; expected local, slurm or ray")
        if self.workers < 0 or self.threads < 0:
            raise ConfigError(f"--workers {self.workers} and --threads {self.threads} must be at least 0")
        if self.executor == "slurm" and not self.slurm.get("partition"):
            raise ConfigError("--executor slurm needs --slurm partition=NAME")
        if self.executor == "slurm" and shutil.which("sbatch") is None:
            raise ConfigError("--executor slurm: there is no sbatch on this machine; use --executor local")
        if self.executor == "ray":
            import importlib.util

            if importlib.util.find_spec("ray") is None:
                raise ConfigError("--executor ray needs the package ray (pip install ray); use --executor local")


def unit_folder(work: Path, number: int) -> Path:
    """Where the part of shard `number` lies until the store is put together."""
    return work / "units" / f"{number:05d}"


class TokenizeUnit(PipelineStep):
    """datatrove's task number N tokenizes shard N of the plan."""

    name = "tokenize a shard"
    type = "megacm3"

    def __init__(self, work: str, device: str, threads: int) -> None:
        super().__init__()
        self.work, self.device, self.threads = work, device, threads

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Make part `rank`; a damaged shard is noted under `failed/` and does not stop the others."""
        work = Path(self.work)
        plan = read_json(work / "plan.json")
        raw = plan["shards"][rank]
        shard = Shard(**raw | {"rows": tuple(raw["rows"]) if raw["rows"] else None, "files": tuple(raw["files"])})
        keep_freed_memory()
        tokenizers = _tokenizers(*plan["paths"], _own_device(self.device), *plan["tokenizers"].values())
        runner = UnitRunner(*tokenizers, UnitSettings.from_json(plan["settings"]), self.threads)
        with _progress_file(work, runner, plan["bytes"][rank]):
            try:
                runner.run(shard, unit_folder(work, rank))
            except ShardFault as fault:
                write_fault(work / "failed" / f"{rank:05d}.json", shard, fault)
        return iter(())


@functools.lru_cache(maxsize=1)
def _tokenizers(text: str, image: str, device: str, *fingerprints: str) -> tuple[TextTokenizer, ImageTokenizer]:
    # A process works on many units: reading, hashing and moving the weights once is enough.
    return TextTokenizer.load(text), ImageTokenizer.load(image, device)


_MALLOC_OPTIONS = (-1, -3)
"""glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD (malloc.h)."""


def keep_freed_memory() -> None:
    """Let this process reuse large blocks instead of giving them back to the system; does nothing without glibc.

    Every batch needs the same ones again: by default their pages are unmapped, mapped and zeroed anew for each layer,
    a quarter of the encoder's time on the CPU.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in _MALLOC_OPTIONS:
            mallopt(option, 1 << 30)


def _own_device(device: str) -> str:
    import torch

    if device != "cuda" or not torch.cuda.is_available():
        return device
    identity = multiprocessing.current_process()._identity
    return f"cuda:{(identity[0] - 1 if identity else 0) % torch.cuda.device_count()}"


@contextmanager
def _progress_file(work: Path, runner: UnitRunner, size: int) -> Iterator[None]:
    # One file a process, rewritten each second: input bytes and documents done by this process.
    path = work / "progress" / f"{os.uname().nodename}-{os.getpid()}"
    before = _numbers(path)
    done = threading.Event()

    def write(bytes_done: int) -> None:
        with new_file(path) as temporary:
            temporary.write_text(f"{before[0] + bytes_done} {before[1] + runner.documents}")

    def watch() -> None:
        while not done.wait(1.0):
            write(min(runner.bytes, size))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        write(size)


def _numbers(path: Path) -> list[int]:
    return [int(n) for n in path.read_text().split()] if path.is_file() else [0, 0]


def run_units(work: Path, plan: dict[str, Any], options: ExecutorOptions) -> bool:
    """Make the parts that are missing. False when they were handed to Slurm, True when they ran to their end here."""
    tasks = len(plan["shards"])
    missing = [n for n in range(tasks) if read_part(unit_folder(work, n)) is None]
    if not missing:
        return True
    cores = len(os.sched_getaffinity(0))
    workers = options.workers or (_gpus() if options.device == "cuda" else cores)
    if options.executor == "slurm":
        threads = options.threads or int((_SLURM_DEFAULTS | options.slurm)["cpus_per_task"])
        step = TokenizeUnit(str(work), options.device, threads)
        submit(step, len(plan["shards"]), f"pretokenize-{plan['job'][:8]}", work, options)
        return False
    threads = options.threads or max(1, cores // min(workers, len(missing)))
    step = TokenizeUnit(str(work), options.device, threads)
    with _bar(work, sum(plan["bytes"][n] for n in missing)):
        if options.executor == "ray":
            from datatrove.executor.ray import RayPipelineExecutor

            RayPipelineExecutor([step], tasks=tasks, workers=workers, logging_dir=str(work / "log")).run()
        else:
            # Workers are forked from a server that imported the slow libraries once.
            multiprocessing.set_forkserver_preload(list(_SLOW_IMPORTS))
            run_here(step, tasks, min(workers, len(missing)), work / "log")
    return True


def run_here(step: Any, tasks: int, workers: int, log: Path) -> None:
    """Run the tasks of a datatrove step that `log` does not note as completed, `workers` processes at a time.

    Raises what a task raises, and DataError when a process was killed: the pool of datatrove's own `run` would wait
    for its task for ever.
    """
    from datatrove.executor.local import LocalPipelineExecutor

    executor = LocalPipelineExecutor([step], tasks=tasks, workers=workers, logging_dir=str(log))
    if workers == 1:
        executor.run()
        return
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver"), _begin_worker) as pool:
        try:
            ranks = executor.get_incomplete_ranks(range(tasks))
            # datatrove repeats the log of local rank 0 on the terminal.
            for future in as_completed([pool.submit(executor._run_for_rank, rank, 1) for rank in ranks]):
                future.result()
        except BaseException as fault:
            for child in multiprocessing.active_children():
                if child not in others:
                    child.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(fault, BrokenProcessPool):
                raise DataError(
                    "a worker was killed, by the system if memory was short; what was finished is kept: run the same "
                    "command again, with fewer --workers if memory was short"
                ) from fault
            raise


def _begin_worker() -> None:
    # Ctrl-C reaches every process of the terminal; the parent ends the workers, which then say nothing. They end with a
    # parent that was killed, too, so as not to write into the folder of the run that follows it.
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def submit(step: Any, tasks: int, name: str, work: Path, options: ExecutorOptions) -> None:
    """Hand `tasks` tasks of a datatrove step to Slurm; the job's number goes to `work/submitted.json`.

    Raises ConfigError when sbatch refuses them.
    """
    from datatrove.executor.slurm import SlurmPipelineExecutor

    given = _SLURM_DEFAULTS | options.slurm
    root = Path(__file__).resolve().parents[2]
    executor = SlurmPipelineExecutor(
        [step],
        tasks=tasks,
        workers=options.workers or -1,
        partition=given.pop("partition"),
        time=given.pop("time"),
        cpus_per_task=int(given.pop("cpus_per_task")),
        mem_per_cpu_gb=int(given.pop("mem_per_cpu_gb")),
        gpus_per_task=1 if options.device.startswith("cuda") else 0,
        qos=given.pop("qos"),
        job_name=name,
        # The tasks find this package and this environment, whatever their login shell says.
        env_command=f"export PYTHONPATH={root}:$PYTHONPATH PATH={Path(sys.executable).parent}:$PATH",
        logging_dir=str(work / "log"),
        sbatch_args=given,
    )
    try:
        executor.run()
    except (subprocess.CalledProcessError, OSError) as fault:
        raise ConfigError(f"sbatch refused the job: {fault}; see --slurm") from fault
    write_json(work / "submitted.json", {"job": executor.job_id})


def running_job(work: Path) -> str | None:
    """The number of the Slurm job that was handed in for this work and is still in the queue.

    A job counts as gone when squeue says so, not when squeue fails, as it does while the controller is busy.
    """
    if not (work / "submitted.json").is_file() or shutil.which("squeue") is None:
        return None
    job = str(read_json(work / "submitted.json")["job"])
    listed = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False)
    gone = "invalid job id" in listed.stderr.lower()
    return job if listed.stdout.strip() or (listed.returncode and not gone) else None


@contextmanager
def _bar(work: Path, total: int) -> Iterator[None]:
    from tqdm import tqdm

    done = threading.Event()
    wait = 0.5 if sys.stderr.isatty() else 10
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="pretokenize", mininterval=wait, file=sys.stderr)

    def show() -> None:
        sums = [0, 0]
        # Names with a dot in front are half-written.
        for path in (work / "progress").glob("[!.]*"):
            sums = [a + b for a, b in zip(sums, _numbers(path), strict=True)]
        bar.set_postfix(documents=sums[1], refresh=False)
        bar.update(min(sums[0], total) - bar.n)

    def watch() -> None:
        while not done.wait(1.0):
            show()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        show()
        bar.close()
