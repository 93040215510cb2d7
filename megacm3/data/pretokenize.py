"""Pretokenization: shards of pairs or texts become a token store.

Work is cut into units (one input shard, one part), which datatrove's executors run here, under Slurm or under Ray.
What is finished lies in `STORE.work`; the store appears under its own name when every unit is done. Any run can be
killed and started again: finished units are kept, and the store is the same to the byte.
"""

import glob
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megacm3.data.executors import ExecutorOptions, run_units, running_job, unit_folder
from megacm3.data.filters import NAMES, PREFIX
from megacm3.data.parts import assemble, read_part
from megacm3.data.sources import Shard, find_shards, identities
from megacm3.data.store import KIND, Store
from megacm3.data.units import UnitSettings, shape_of
from megacm3.errors import ConfigError, DataError
from megacm3.files import read_json, read_manifest, sha256_json, write_json
from megacm3.sft.read import sft_shards
from megacm3.tokenizers.image import KIND as IMAGE_KIND
from megacm3.tokenizers.image import ImageTokenizer, torch_device
from megacm3.tokenizers.text import KIND as TEXT_KIND
from megacm3.tokenizers.text import TextTokenizer

logger = logging.getLogger(__name__)


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
    where: ExecutorOptions = field(default_factory=ExecutorOptions)
    """Where the work runs."""
    max_reject_rate: float = 0.05
    """Share of rows that may be rejected."""
    rows_per_unit: int = 10_000
    """Rows of a `datasets` data set in one unit."""
    overwrite: bool = False
    """Replace a store, or unfinished work, that was made from other inputs or settings."""
    images: str = ""
    """Fine-tuning: folder of the pictures that records name; empty = that of each input file."""


@dataclass(frozen=True)
class PretokenizeReport:
    """What a job did."""

    documents: int
    tokens: int
    rejects: dict[str, int]
    """Number of rejected rows by reason."""
    seconds: float
    """Wall time of this run; 0 when there was nothing to do."""
    submitted: str = ""
    """Set when the work is with Slurm: what there is to say about it. Run the same command again when it is done."""


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
        with _only_one(work):
            # The run that held it before may have made the store.
            if not _finished(options, plan):
                return _run(options, work, plan, started)
            return _report(Store.open(options.output), 0.0)
    except OSError as fault:
        raise DataError(f"{fault.filename or work}: {fault.strerror or fault}") from fault


def _run(options: PretokenizeOptions, work: Path, plan: dict[str, Any], started: float) -> PretokenizeReport:
    job = running_job(work)
    if job is not None:
        return PretokenizeReport(0, 0, {}, 0.0, f"Slurm job {job} is still in the queue")
    if options.where.executor == "slurm":
        _refuse_failed(work, plan)
    _prepare_work(work, plan, options)
    if not run_units(work, plan, options.where):
        return PretokenizeReport(0, 0, {}, 0.0, f"submitted to Slurm as job {running_job(work) or ''}".rstrip())
    _refuse_failed(work, plan)
    parts = _parts(work, plan)
    _check_rejects(parts, options)
    text, image = TextTokenizer.load(options.text_tokenizer), ImageTokenizer.load(options.image_tokenizer)
    settings = {"pretokenize": plan["settings"] | {"inputs": plan["inputs"]}, "job": plan["job"]}
    vocabulary = text.vocabulary(image.codebook_size, image.grid[0] * image.grid[1])
    if vocabulary.family != "cm3leon":
        settings["vocabulary"] = vocabulary.to_json()
    if options.settings.sft is not None:
        settings["sft"] = {"family": vocabulary.family} | plan["settings"]["sft"]
    shape = shape_of(text, image)
    store = assemble(options.output, parts, shape, plan["tokenizers"], settings, replace=options.overwrite)
    shutil.rmtree(work, ignore_errors=True)
    return _report(store, time.monotonic() - started)


_LOCK_SECONDS = 5.0
"""Workers of a run that was just killed hold its lock until they are gone too."""


@contextmanager
def _only_one(work: Path) -> Iterator[None]:
    # Two runs on one work folder would remove each other's unfinished files. The lock ends with the process.
    import fcntl

    path = work / "lock"
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        work.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as fault:
                if time.monotonic() > deadline:
                    raise DataError(f"another process is at work on {work}; wait for it or end it") from fault
                time.sleep(0.1)
                continue
            # The run that held it before may have finished and removed the file.
            if not path.exists() or os.fstat(lock.fileno()).st_ino != path.stat().st_ino:
                continue
            try:
                yield
            finally:
                # Nothing stays of a run that had nothing to do.
                if work.is_dir() and os.listdir(work) == ["lock"]:
                    shutil.rmtree(work)
            return


def _check(options: PretokenizeOptions) -> None:
    options.where.check()
    torch_device(options.where.device)
    if options.settings.mode not in ("crop", "pad"):
        raise ConfigError(f"--mode {options.settings.mode}; expected crop or pad")
    for name in options.settings.text_filters:
        if name not in NAMES:
            raise ConfigError(f"--text-filter {name}; expected one of {', '.join(NAMES)}")
    if options.settings.sft is None and options.images:
        raise ConfigError("--images is for --sft; other inputs hold their pictures or name them below their own folder")
    if options.settings.max_tokens < 0:
        raise ConfigError(f"--max-tokens {options.settings.max_tokens} must be at least 0")
    if options.settings.batch < 1:
        raise ConfigError(f"--batch {options.settings.batch} must be at least 1")
    if not 0 <= options.max_reject_rate <= 1:
        raise ConfigError(f"--max-reject-rate {options.max_reject_rate} is no share between 0 and 1")


def _plan(options: PretokenizeOptions) -> dict[str, Any]:
    tokenizers = {
        "text_tokenizer": read_manifest(options.text_tokenizer, TEXT_KIND, verify="sha256").fingerprint,
        "image_tokenizer": read_manifest(options.image_tokenizer, IMAGE_KIND, verify="sha256").fingerprint,
    }
    sft = options.settings.sft
    if sft is None:
        shards = find_shards(options.inputs, options.rows_per_unit)
    else:
        shards = sft_shards(options.inputs, options.images, sft, options.rows_per_unit)
    found = identities(shards)
    inputs = sha256_json(found)
    settings = asdict(options.settings)
    settings["text_filters"] = list(options.settings.text_filters)
    for name in ("sft", "max_tokens"):
        # Stores of captions and texts stay what they were.
        if not settings[name]:
            del settings[name]
    return {
        "job": sha256_json({"inputs": inputs, "settings": settings, "tokenizers": tokenizers}),
        "inputs": inputs,
        "settings": settings,
        "tokenizers": tokenizers,
        "paths": [os.path.abspath(options.text_tokenizer), os.path.abspath(options.image_tokenizer)],
        "shards": [asdict(shard) for shard in shards],
        "bytes": [_size(shard) for shard in shards],
        "identities": found,
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
        other = old["job"] != plan["job"] and not _continues(work, old, plan)
        if other and not options.overwrite:
            raise DataError(
                f"{work} holds unfinished work made with {_difference(old, plan)}; remove it or give --overwrite"
            )
        if other:
            for name in ("units", "log"):
                shutil.rmtree(work / name, ignore_errors=True)
    for name in ("failed", "progress"):
        shutil.rmtree(work / name, ignore_errors=True)
        (work / name).mkdir(parents=True)
    write_json(work / "plan.json", plan)
    # Of units, and of a store that was being put together: `new_folder` names it after the process, which was killed.
    output = Path(options.output)
    unfinished = output.parent.glob(f".{glob.escape(output.name)}.*.tmp")
    for leftover in (*(work / "units").glob(".*"), *unfinished):
        shutil.rmtree(leftover, ignore_errors=True)
    # datatrove marks a task as complete when it did not raise; what counts here is the part that it left.
    for mark in (work / "log" / "completions").glob("*"):
        if read_part(unit_folder(work, int(mark.name))) is None:
            mark.unlink()


def _continues(work: Path, old: dict[str, Any], plan: dict[str, Any]) -> bool:
    """Whether what is finished of an older plan is the new one's too: since then, only shards that were not done have
    been repaired, or damaged ones have been allowed."""
    same = [entry["name"] for entry in old["shards"]] == [entry["name"] for entry in plan["shards"]]
    same &= old["tokenizers"] == plan["tokenizers"]
    partly = {"allow_partial": plan["settings"]["allow_partial"]}
    same &= old["settings"] | (partly if partly["allow_partial"] else {}) == plan["settings"]
    before = old.get("identities", [])
    return same and all(
        before[number : number + 1] == [now] or read_part(unit_folder(work, number)) is None
        for number, now in enumerate(plan["identities"])
    )


def _refuse_failed(work: Path, plan: dict[str, Any]) -> None:
    paths = sorted((work / "failed").glob("*.json"))
    failed = [read_json(path) for path in paths]
    for path in paths:
        path.unlink()
    if failed:
        listed = "; ".join(fault["reason"] for fault in failed[:5])
        raise DataError(
            f"{len(failed)} of {len(plan['shards'])} shards cannot be used: {listed}. "
            f"The others are done and kept; run again after the repair, or with --allow-partial"
        )


def _parts(work: Path, plan: dict[str, Any]) -> list[Path]:
    parts = [unit_folder(work, number) for number in range(len(plan["shards"]))]
    missing = [number for number, part in enumerate(parts) if read_part(part) is None]
    if missing:
        raise DataError(f"{len(missing)} of {len(parts)} units are not done (first {missing[0]}); see {work}/log")
    return parts


def _check_rejects(parts: list[Path], options: PretokenizeOptions) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(pq.read_table(part / "rejects.parquet", columns=["reason"])["reason"].to_pylist())
    rejects = sum(n for reason, n in counts.items() if not reason.startswith(PREFIX))
    rows = counts.total() + sum(result["documents"] for part in parts if (result := read_part(part)))
    if not counts:
        return
    reasons = ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
    logger.info("%d of %d rows left out: %s", counts.total(), rows, reasons)
    if rejects > options.max_reject_rate * rows:
        listing = Path(options.output.rstrip("/") + ".rejects.parquet")
        pq.write_table(pa.concat_tables([pq.read_table(part / "rejects.parquet") for part in parts]), listing)
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
