"""How good and how fast a memory bank is beside bare FAISS with the same index.

Each phase runs in a process of its own, so that its memory is its own, and leaves `WORK/results/PHASE.json`; a run that
was stopped goes on with the next phase. Bare FAISS means: one index of the same factory string, trained on the same
vectors, with the library's own threads and its own search; it is handed ready document vectors, where the bank
averages its stored halves.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from megacm3.command import seed_from
from megacm3.errors import DataError
from megacm3.files import read_json, write_json
from megacm3.retrieval import index as indexes
from megacm3.retrieval.backends import FAISS
from megacm3.retrieval.bank import Embeddings, MemoryBank
from megacm3.retrieval.benchmark_data import BenchmarkData, make_vectors, parts_of, write_bank
from megacm3.retrieval.build_index import make_shards
from megacm3.retrieval.jobs import FOLDER
from megacm3.retrieval.options import BankOptions
from megacm3.retrieval.recall import exact_search, measure_recall, overlap
from megacm3.retrieval.shards import FaissShards

logger = logging.getLogger(__name__)

KINDS = ("image", "text")
K = 10
_ROUNDS = 7
"""Times that bank and bare FAISS answer all queries, in turn; the medians count."""
_SINGLE = 1000
"""Queries asked one at a time, as at inference."""
_BLOCK = 8192


def benchmark_retrieval(
    work: Path, data: BenchmarkData, index: str, say: Callable[[str], None], only: tuple[str, ...] = ()
) -> dict[str, dict[str, Any]]:
    """Run the phases that are missing in `work` (or those of `only`); gives the figures of each phase.

    Raises ConfigError for data or an index that cannot be, DataError for a `work` that holds another benchmark.
    """
    data.check()
    indexes.new_index(index, data.dim)
    plan = {"data": asdict(data) | {"inputs": list(data.inputs)}, "index": index}
    if (work / "plan.json").is_file() and read_json(work / "plan.json") != plan:
        raise DataError(f"{work} holds a benchmark of other settings; give another --work, or remove it")
    (work / "results").mkdir(parents=True, exist_ok=True)
    write_json(work / "plan.json", plan)
    found: dict[str, dict[str, Any]] = {}
    for name, phase in PHASES.items():
        path = work / "results" / f"{name}.json"
        if not path.is_file() and (not only or name in only):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                write_json(path, pool.submit(_measured, phase, work, data, index).result())
        if path.is_file():
            found[name] = read_json(path)
            say(f"{name}: {found[name]['seconds']:.1f} s, at most {found[name]['memory_gb']:.2f} GB resident")
    return found


def _measured(
    phase: Callable[[Path, BenchmarkData, str], dict[str, Any]], work: Path, data: BenchmarkData, index: str
) -> dict[str, Any]:
    # All cores, whatever the environment says of threads.
    cores = len(os.sched_getaffinity(0))
    import torch

    torch.set_num_threads(cores)
    with indexes.faiss_threads(cores), peak_memory() as peak:
        started = time.perf_counter()
        result = phase(work, data, index)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "memory_gb": peak[0] / 1e9} | result


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The largest sum of resident bytes of this process and its children inside the block, looked at 10 times a second;
    mapped files count, pages that processes share (libraries) count once."""
    import psutil

    me, done, peak = psutil.Process(), threading.Event(), [0]

    def look() -> None:
        total = 0
        for process in [me, *me.children(recursive=True)]:
            try:
                # On Linux; elsewhere the resident size, in which shared pages count in each process.
                memory = process.memory_full_info()
                total += getattr(memory, "pss", memory.rss)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                # It ended meanwhile.
                continue
        peak[0] = max(peak[0], total)

    def watch() -> None:
        while not done.wait(0.1):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        look()


def _embeddings(work: Path, data: BenchmarkData) -> Embeddings:
    return Embeddings(work / FOLDER, parts_of(data.documents))


def _build(work: Path, data: BenchmarkData, index: str) -> dict[str, Any]:
    shutil.rmtree(work / FOLDER / "index", ignore_errors=True)
    shutil.rmtree(work / "done", ignore_errors=True)
    _, paths = make_shards(work, parts_of(data.documents), _options(data, index), 0)
    return {"shards": len(paths), "bytes": sum(path.stat().st_size for path in paths)}


def _options(data: BenchmarkData, index: str) -> BankOptions:
    return BankOptions(store="", encoder="", output="", index=index, seed=data.seed)


def _build_bare(work: Path, data: BenchmarkData, index: str) -> dict[str, Any]:
    faiss = indexes.load_faiss()
    ready = np.load(work / "documents.npy", mmap_mode="r")
    made = faiss.index_factory(data.dim, index, faiss.METRIC_INNER_PRODUCT)
    listed = faiss.try_extract_index_ivf(made)
    if listed is not None:
        rng = np.random.default_rng(seed_from(data.seed, "index training"))
        wanted = indexes.training_rows(data.documents, made)
        made.train(ready[np.sort(rng.choice(data.documents, wanted, replace=False))].astype(np.float32))
    for start in range(0, data.documents, _BLOCK):
        made.add(ready[start : start + _BLOCK].astype(np.float32))
    faiss.write_index(made, str(work / "bare.faiss"))
    return {"bytes": (work / "bare.faiss").stat().st_size}


def _exact(work: Path, data: BenchmarkData, index: str) -> dict[str, Any]:
    embeddings, ids = _embeddings(work, data), np.arange(data.documents)
    for kind in KINDS:
        queries = np.load(work / f"{kind}_queries.npy")
        np.save(work / f"{kind}_truth.npy", exact_search(queries, embeddings, ids, K))
    return {}


def _tune(work: Path, data: BenchmarkData, index: str) -> dict[str, Any]:
    folder = work / FOLDER
    paths = sorted((folder / "index").glob("shard-*.faiss"))
    measured: dict[str, Any] = {"nprobe": 0}
    if (folder / "index" / "trained.faiss").is_file():
        measured = measure_recall(FaissShards(paths), _embeddings(work, data), np.arange(data.documents), 0, data.seed)
    settings = {"backend": FAISS, "index": index, "shards": len(paths), "nprobe": measured["nprobe"], "recall": {}}
    write_bank(folder, data, settings | {"index_files": [path.name for path in paths]})
    return measured


def _search(work: Path, data: BenchmarkData, index: str) -> dict[str, Any]:
    faiss = indexes.load_faiss()
    bank = MemoryBank.open(work / FOLDER)
    bare = faiss.read_index(str(work / "bare.faiss"), faiss.IO_FLAG_MMAP_IFC)
    index_of_bank = bank.index
    assert isinstance(index_of_bank, FaissShards)
    listed = faiss.try_extract_index_ivf(bare)
    if listed is not None:
        listed.nprobe = index_of_bank.nprobe
    result: dict[str, Any] = {"nprobe": index_of_bank.nprobe, "nlist": index_of_bank.nlist}
    for kind in KINDS:
        queries, truth = np.load(work / f"{kind}_queries.npy"), np.load(work / f"{kind}_truth.npy")
        asked = {"bank": partial(bank.search, queries, K), "bare": partial(bare.search, queries, K)}
        times: dict[str, list[float]] = {name: [] for name in asked}
        recall: dict[str, float] = {}
        for _ in range(_ROUNDS):
            for name, call in asked.items():
                seconds, answer = _timed(call)
                times[name].append(seconds)
                recall.setdefault(name, overlap(answer[1], truth))
        rates = {name: len(queries) / float(np.median(seconds)) for name, seconds in times.items()}
        result[kind] = {
            "recall": recall["bank"],
            "recall_bare": recall["bare"],
            "rate": rates["bank"],
            "rate_bare": rates["bare"],
            "seconds": times,
        }
    one = np.load(work / "text_queries.npy")[:_SINGLE]
    waits = [_timed(partial(bank.search, one[n : n + 1], 2))[0] for n in range(len(one))]
    return result | {"latency_ms": {f"p{p}": float(np.percentile(waits, p)) * 1e3 for p in (50, 99)}}


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    answer = call()
    return time.perf_counter() - started, answer


def _vectors(work: Path, data: BenchmarkData, index: str) -> dict[str, Any]:
    return make_vectors(work, data)


PHASES = {
    "vectors": _vectors,
    "build": _build,
    "build_bare": _build_bare,
    "exact": _exact,
    "tune": _tune,
    "search": _search,
}


def report(found: dict[str, dict[str, Any]], data: BenchmarkData) -> list[str]:
    """The figures in words, those of the finished phases."""
    lines = []
    if "vectors" in found:
        made = found["vectors"]
        lines.append(
            f"{data.documents} documents of width {data.dim} made of {made['pairs']} real pairs ({made['pictures']} "
            f"jittered pictures x {made['captions']} captions with dropped tokens); queries: {data.queries} of each "
            f"kind from {made['held_out_pairs']} pairs held out ({made['different_text_queries']} different captions)"
        )
    if "build" in found and "build_bare" in found:
        ours, bare = found["build"], found["build_bare"]
        lines.append(
            f"build: {ours['seconds']:.1f} s, bare FAISS {bare['seconds']:.1f} s: "
            f"{ours['seconds'] / bare['seconds']:.2f} x; {ours['bytes'] / data.documents:.0f} bytes a document; at "
            f"most {ours['memory_gb']:.2f} GB resident (bare {bare['memory_gb']:.2f})"
        )
    if "search" in found:
        searched = found["search"]
        for kind in KINDS:
            one = searched[kind]
            lines.append(
                f"{kind} queries: recall@{K} {one['recall']:.4f} (bare FAISS {one['recall_bare']:.4f}) with nprobe "
                f"{searched['nprobe']} of {searched['nlist']}; {one['rate']:.0f} queries/s, bare {one['rate_bare']:.0f}"
                f": {one['rate'] / one['rate_bare']:.2f} x"
            )
        waits = searched["latency_ms"]
        lines.append(
            f"one query at a time: p50 {waits['p50']:.2f} ms, p99 {waits['p99']:.2f} ms; at most "
            f"{searched['memory_gb']:.2f} GB resident with both indexes open"
        )
    return lines
