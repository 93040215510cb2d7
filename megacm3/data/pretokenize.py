"""Pretokenization: shards of pairs or texts become a token store.

Work is cut into units (one input shard, one part), which datatrove's executors run here, under Slurm or under Ray.
What is finished lies in `STORE.work`; the store appears under its own name when every unit is done. Any run can be
killed and started again: finished units are kept, and the store is the same to the byte.
"""

import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import loguru
from datatrove.pipeline.base import PipelineStep

from megacm3.data.parts import assemble, read_part
from megacm3.data.sources import Shard, find_shards, identify
from megacm3.data.store import KIND, Store
from megacm3.data.units import ShardFault, UnitRunner, UnitSettings, shape_of, write_fault
from megacm3.errors import ConfigError, DataError
from megacm3.files import new_file, read_json, read_manifest, sha256_json, write_json
from megacm3.tokenizers.image import KIND as IMAGE_KIND
from megacm3.tokenizers.image import ImageTokenizer
from megacm3.tokenizers.text import KIND as TEXT_KIND
from megacm3.tokenizers.text import TextTokenizer

logger = logging.getLogger(__name__)
# Every unit would log a dozen lines of datatrove's own; faults come back as exceptions and through `failed/`.
loguru.logger.disable("datatrove")

_SLOW_IMPORTS = ("torch", "diffusers.models.autoencoders.vq_model", "webdataset.tariterators", "pyarrow.parquet")
"""What a worker needs and takes seconds to import."""


@dataclass(frozen=True)
class PretokenizeOptions:
    """A pretokenization job."""

    inputs: tuple[str, ...]
    """Paths and glob patterns."""
    text_tokenizer: str
    image_tokenizer: str
    output: str
    """The store to make."""
    settings: UnitSettings = field(default_factory=UnitSettings)
    executor: str = "local"
    """local, slurm or ray."""
    workers: int = 0
    """Units at once; 0 for one a CPU core, or one a GPU with device = cuda."""
    threads: int = 0
    """Threads that decode pictures, in each worker; 0 for a share of the cores."""
    device: str = "cpu"
    """Where pictures are encoded: cpu, cuda (each worker its own GPU) or cuda:N."""
    max_reject_rate: float = 0.05
    """Share of rows that may be rejected."""
    rows_per_unit: int = 10_000
    """Rows of a `datasets` data set in one unit."""
    overwrite: bool = False
    """Replace a store, or unfinished work, that was made from other inputs or settings."""
    slurm: dict[str, str] = field(default_factory=dict)
    """Slurm: partition, time, mem_per_cpu_gb, cpus_per_task, and further sbatch options."""


@dataclass(frozen=True)
class PretokenizeReport:
    """What a job did."""

    documents: int
    tokens: int
    rejects: dict[str, int]
    """Number of rejected rows by reason."""
    seconds: float
    """Wall time of this run; 0 when there was nothing to do."""
    submitted: bool = False
    """The work was handed to Slurm; run the same command again when it is done."""


def pretokenize(options: PretokenizeOptions) -> PretokenizeReport:
    """Run or continue a job.

    Raises DataError for bad inputs, damaged shards or too many rejects, ConfigError for flags.
    """
    started = time.monotonic()
    _check(options)
    work = Path(options.output.rstrip("/") + ".work")
    plan = _plan(options)
    if _finished(options, plan):
        logger.info("%s is finished already: same inputs, tokenizers and settings", options.output)
        return _report(Store.open(options.output), 0.0)
    try:
        _prepare_work(work, plan, options)
        if not _run(work, plan, options):
            return PretokenizeReport(0, 0, {}, time.monotonic() - started, submitted=True)
        parts = _parts(work, plan, options)
        _check_rejects(parts, options)
        inputs = plan["tokenizers"]
        text, image = TextTokenizer.load(options.text_tokenizer), ImageTokenizer.load(options.image_tokenizer)
        settings = {"pretokenize": plan["settings"] | {"inputs": plan["inputs"]}, "job": plan["job"]}
        vocabulary = text.vocabulary(image.codebook_size, image.grid[0] * image.grid[1])
        if vocabulary.family != "cm3leon":
            settings["vocabulary"] = vocabulary.to_json()
        store = assemble(options.output, parts, shape_of(text, image), inputs, settings, replace=options.overwrite)
    except OSError as fault:
        raise DataError(f"{fault.filename or work}: {fault.strerror or fault}") from fault
    shutil.rmtree(work, ignore_errors=True)
    return _report(store, time.monotonic() - started)


def _check(options: PretokenizeOptions) -> None:
    if options.executor not in ("local", "slurm", "ray"):
        raise ConfigError(f"--executor {options.executor}; expected local, slurm or ray")
    if options.settings.mode not in ("crop", "pad"):
        raise ConfigError(f"--mode {options.settings.mode}; expected crop or pad")
    if options.settings.batch < 1 or options.workers < 0 or options.threads < 0:
        raise ConfigError("--batch must be at least 1, --workers and --threads at least 0")
    if not 0 <= options.max_reject_rate <= 1:
        raise ConfigError(f"--max-reject-rate {options.max_reject_rate} is no share between 0 and 1")


def _plan(options: PretokenizeOptions) -> dict[str, Any]:
    tokenizers = {
        "text_tokenizer": read_manifest(options.text_tokenizer, TEXT_KIND, verify="sha256").fingerprint,
        "image_tokenizer": read_manifest(options.image_tokenizer, IMAGE_KIND, verify="sha256").fingerprint,
    }
    shards = find_shards(options.inputs, options.rows_per_unit)
    inputs = identify(shards)
    settings = asdict(options.settings)
    return {
        "job": sha256_json({"inputs": inputs, "settings": settings, "tokenizers": tokenizers}),
        "inputs": inputs,
        "settings": settings,
        "tokenizers": tokenizers,
        "paths": [os.path.abspath(options.text_tokenizer), os.path.abspath(options.image_tokenizer)],
        "shards": [asdict(shard) for shard in shards],
        "bytes": [_size(shard) for shard in shards],
    }


def _size(shard: Shard) -> int:
    return os.path.getsize(shard.path) if os.path.isfile(shard.path) else 0


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    for name, value in new["tokenizers"].items():
        if old["tokenizers"].get(name) != value:
            return f"another {name.replace('_', ' ')} ({str(old['tokenizers'].get(name))[:12]} then, {value[:12]} now)"
    for name, value in new["settings"].items():
        if old["settings"].get(name) != value:
            return f"{name} = {old['settings'].get(name)} then, {value} now"
    return "other input files"


def _finished(options: PretokenizeOptions, plan: dict[str, Any]) -> bool:
    output = Path(options.output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if options.overwrite and not (output / "manifest.json").is_file():
        raise DataError(f"{output} is no store; --overwrite replaces only stores")
    manifest = read_manifest(output, KIND)
    if manifest.settings.get("job") == plan["job"]:
        return True
    if options.overwrite:
        return False
    old = {"tokenizers": manifest.inputs, "settings": manifest.settings.get("pretokenize", {})}
    raise DataError(
        f"{output} exists and was made with {_difference(old, plan)}; "
        f"give another --output, or --overwrite to replace it"
    )


def _prepare_work(work: Path, plan: dict[str, Any], options: PretokenizeOptions) -> None:
    if (work / "plan.json").is_file():
        old = read_json(work / "plan.json")
        if old["job"] != plan["job"] and not options.overwrite:
            raise DataError(
                f"{work} holds unfinished work made with {_difference(old, plan)}; remove it or give --overwrite"
            )
        if old["job"] != plan["job"]:
            shutil.rmtree(work)
    for name in ("failed", "progress"):
        shutil.rmtree(work / name, ignore_errors=True)
        (work / name).mkdir(parents=True)
    write_json(work / "plan.json", plan)
    for leftover in (work / "units").glob(".*") if (work / "units").is_dir() else ():
        shutil.rmtree(leftover, ignore_errors=True)
    # datatrove marks a task as complete when it did not raise; what counts here is the part that it left.
    for mark in (work / "log" / "completions").glob("*"):
        if read_part(_unit(work, int(mark.name))) is None:
            mark.unlink()


def _unit(work: Path, number: int) -> Path:
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
        shard = Shard(**raw | {"rows": tuple(raw["rows"]) if raw["rows"] else None})
        _ignore_interrupt()
        runner = _runner(plan, _own_device(self.device), self.threads)
        with _progress_file(work, runner, plan["bytes"][rank]):
            try:
                runner.run(shard, _unit(work, rank))
            except ShardFault as fault:
                write_fault(work / "failed" / f"{rank:05d}.json", shard, fault)
        return iter(())


def _runner(plan: dict[str, Any], device: str, threads: int) -> UnitRunner:
    text, image = plan["paths"]
    runner = UnitRunner(
        TextTokenizer.load(text), ImageTokenizer.load(image, device), UnitSettings(**plan["settings"]), threads
    )
    return runner


def _ignore_interrupt() -> None:
    # Ctrl-C reaches every process of the terminal; the parent ends the workers, which then say nothing.
    import signal

    import multiprocess

    if multiprocess.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _own_device(device: str) -> str:
    import multiprocess
    import torch

    if device != "cuda" or not torch.cuda.is_available():
        return device
    identity = multiprocess.current_process()._identity
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


def _run(work: Path, plan: dict[str, Any], options: PretokenizeOptions) -> bool:
    # True when the units ran to their end here; False when they were handed to Slurm.
    missing = [n for n in range(len(plan["shards"])) if read_part(_unit(work, n)) is None]
    if not missing:
        return True
    cores = len(os.sched_getaffinity(0))
    workers = options.workers or (_gpus() if options.device == "cuda" else cores)
    threads = options.threads or max(1, cores // min(workers, len(missing)))
    step = TokenizeUnit(str(work), options.device, threads)
    if options.executor == "slurm":
        return _run_slurm(step, work, plan, options, workers)
    if options.executor == "ray":
        _run_ray(step, work, plan, workers)
        return True
    import multiprocess
    from datatrove.executor.local import LocalPipelineExecutor

    # Workers are forked from a server that imported the slow libraries once.
    multiprocess.set_forkserver_preload(list(_SLOW_IMPORTS))
    workers = min(workers, len(missing))
    tasks = len(plan["shards"])
    executor = LocalPipelineExecutor([step], tasks=tasks, workers=workers, logging_dir=str(work / "log"))
    with _bar(work, sum(plan["bytes"][n] for n in missing)):
        executor.run()
    return True


def _gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _run_slurm(step: TokenizeUnit, work: Path, plan: dict[str, Any], options: PretokenizeOptions, workers: int) -> bool:
    from datatrove.executor.slurm import SlurmPipelineExecutor

    known = {"partition": "", "time": "24:00:00", "cpus_per_task": "1", "mem_per_cpu_gb": "4"}
    given = known | options.slurm
    if not given["partition"]:
        raise ConfigError("--executor slurm needs --slurm partition=NAME")
    if shutil.which("sbatch") is None:
        raise ConfigError("--executor slurm: there is no sbatch on this machine; use --executor local")
    SlurmPipelineExecutor(
        [step],
        tasks=len(plan["shards"]),
        workers=workers,
        partition=given["partition"],
        time=given["time"],
        cpus_per_task=int(given["cpus_per_task"]),
        mem_per_cpu_gb=int(given["mem_per_cpu_gb"]),
        job_name=f"pretokenize-{plan['job'][:8]}",
        logging_dir=str(work / "log"),
        sbatch_args={name: value for name, value in options.slurm.items() if name not in known},
    ).run()
    return False


def _run_ray(step: TokenizeUnit, work: Path, plan: dict[str, Any], workers: int) -> None:
    try:
        from datatrove.executor.ray import RayPipelineExecutor
    except ImportError as fault:
        raise ConfigError("--executor ray needs the package ray (pip install ray); use --executor local") from fault
    RayPipelineExecutor([step], tasks=len(plan["shards"]), workers=workers, logging_dir=str(work / "log")).run()


@contextmanager
def _bar(work: Path, total: int) -> Iterator[None]:
    import sys

    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    done = threading.Event()
    bar = tqdm(
        total=total, unit="B", unit_scale=True, desc="pretokenize", mininterval=10 if quiet else 0.5, file=sys.stderr
    )

    def show() -> None:
        sums = [0, 0]
        for path in (work / "progress").glob("*-*"):
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


def _parts(work: Path, plan: dict[str, Any], options: PretokenizeOptions) -> list[Path]:
    failed = [read_json(path) for path in sorted((work / "failed").glob("*.json"))]
    if failed:
        listed = "; ".join(f"{fault['reason']}" for fault in failed[:5])
        raise DataError(
            f"{len(failed)} of {len(plan['shards'])} shards cannot be used: {listed}. "
            f"The others are done and kept; run again after the repair, or with --allow-partial"
        )
    parts = [_unit(work, number) for number in range(len(plan["shards"]))]
    missing = [number for number, part in enumerate(parts) if read_part(part) is None]
    if missing:
        raise DataError(f"{len(missing)} of {len(parts)} units are not done (first {missing[0]}); see {work}/log")
    return parts


def _check_rejects(parts: list[Path], options: PretokenizeOptions) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    results = [read_part(part) for part in parts]
    rejects = sum(result["rejects"] for result in results if result)
    rows = rejects + sum(result["documents"] for result in results if result)
    if not rejects:
        return
    table = pa.concat_tables([pq.read_table(part / "rejects.parquet") for part in parts])
    reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(table["reason"].to_pylist()).most_common())
    logger.info("%d of %d rows rejected: %s", rejects, rows, reasons)
    if rejects > options.max_reject_rate * rows:
        listing = Path(options.output.rstrip("/") + ".rejects.parquet")
        pq.write_table(table, listing)
        raise DataError(
            f"{rejects} of {rows} rows are rejected ({reasons}), more than --max-reject-rate "
            f"{options.max_reject_rate}; the list is {listing}. "
            f"Finished work is kept: a higher limit completes the store at once"
        )


def _report(store: Store, seconds: float) -> PretokenizeReport:
    import pyarrow.parquet as pq

    reasons: Counter[str] = Counter()
    for path in sorted((store.folder / "rejects").glob("*.parquet")):
        reasons.update(pq.read_table(path, columns=["reason"])["reason"].to_pylist())
    return PretokenizeReport(len(store), store.settings["tokens"], dict(reasons), seconds)
