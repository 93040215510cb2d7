"""What tools/benchmark.py does for each command: measure, print, return the exit code. Imports nothing heavy."""

import argparse
from pathlib import Path

from megacm3.errors import ConfigError


def _new_folder(path: str) -> Path:
    if Path(path).exists():
        raise ConfigError(f"--work {path} exists already; it would be removed")
    return Path(path)


def _say(line: str) -> None:
    print(line, flush=True)


def convert_command(given: argparse.Namespace) -> int:
    """Measure and print `tools/benchmark.py convert`."""
    from megacm3.convert.benchmark import convert

    timings = convert(Path(given.work), given.preset, given.tensor, given.pipeline, _say)
    copies = [timing.seconds for timing in timings if timing.name.startswith("copy")]
    usual = sum(copies) / len(copies)
    for timing in timings:
        if timing.name in ("export", "import") or timing.name.startswith("export,"):
            print(f"{timing.name}: {timing.seconds / usual:.2f} x the time of a copy ({usual:.1f} s on average)")
    return 0


def checkpoint_command(given: argparse.Namespace) -> int:
    """Measure and print `tools/benchmark.py checkpoint`."""
    import torch

    from megacm3.parallel.cpu import prepare
    from megacm3.train import environment

    prepare(torch.device("cpu"))
    environment(None)
    from megacm3.checkpoint.benchmark import benchmark_checkpoint

    timing = benchmark_checkpoint(_new_folder(given.work), given.rounds, _say)
    print(f"{timing.bytes / 1e9:.2f} GB: save {timing.save:.2f} s, of which stall {timing.stall:.2f} s")
    for name, seconds in (("dd conv=fsync", timing.dd), ("dd oflag=direct conv=fsync", timing.direct_dd)):
        print(f"{name}: {seconds:.2f} s; save takes {timing.save / seconds:.2f} x its time")
    return 0


def retrieval_command(given: argparse.Namespace) -> int:
    """Measure and print `tools/benchmark.py retrieval`."""
    from megacm3.retrieval.benchmark import PHASES, benchmark_retrieval, report
    from megacm3.retrieval.benchmark_data import BenchmarkData

    unknown = [name for name in given.only if name not in PHASES]
    if unknown:
        raise ConfigError(f"--only {unknown[0]} is no phase; expected some of {', '.join(PHASES)}")
    data = BenchmarkData(
        tuple(given.input), given.documents, given.queries, given.width, given.encoder_steps, given.seed
    )
    found = benchmark_retrieval(Path(given.work), data, given.index, _say, tuple(given.only))
    for line in report(found, data):
        print(line)
    return 0


def pretokenize_command(given: argparse.Namespace) -> int:
    """Measure and print `tools/benchmark.py pretokenize`."""
    from megacm3.data.benchmark import benchmark_pretokenize

    timing = benchmark_pretokenize(_new_folder(given.work), given.pictures, given.rounds)
    for one in timing.rounds:
        print(
            f"one thread: decoding {one.decode * 1e3:.2f} ms, encoding {one.encode * 1e3:.2f} ms a picture; "
            f"{timing.cores} cores could give {timing.ceiling(one):.0f}/s; "
            f"a job of {timing.pictures} pictures gave {one.rate:.0f}/s, {100 * one.rate / timing.ceiling(one):.0f} %"
        )
    print(f"bare decoding and encoding on all cores at once: {timing.together:.0f}/s")
    print(f"pretokenize: {100 * timing.share:.0f} % of what the cores could give (median)")
    return 0


def loader_command(given: argparse.Namespace) -> int:
    """Measure and print `tools/benchmark.py loader`."""
    import shutil

    from megacm3.data.loader_benchmark import benchmark_loader

    work = _new_folder(given.work)
    try:
        timing = benchmark_loader(work, given.rounds)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"100M documents: first sequence after {timing.seconds:.2f} s, {timing.megabytes:.0f} MB of anonymous memory")
    for (packing, name), rate in timing.rates.items():
        print(f"packing {packing}, documents {name}: {rate / 1e6:.1f}M tokens/s")
    return 0


def train_command(given: argparse.Namespace) -> int:
    """Measure and print `tools/benchmark.py train`."""
    from megacm3.training.benchmark import benchmark_train

    found = benchmark_train(given.rounds, given.overrides, _say, given.profile)
    print(f"{'':16}{'tokens/s':>10}{'of matmul peak':>16}{'peak above states':>19}{'process':>10}")
    for name, result in found.results.items():
        print(
            f"{name:16}{found.tokens_per_second(name):10.0f}{100 * found.utilisation(name):14.1f} %"
            f"{result.above_states / 1e6:16.0f} MB{result.process_bytes / 1e6:7.0f} MB"
        )
    mine = found.results["megacm3"]
    for name in ("transformers", "megatron-core"):
        memory = mine.above_states / found.results[name].above_states
        print(
            f"megacm3: {found.ratio('megacm3', name):.3f} x the speed of {name}, {memory:.2f} x its memory above states"
        )
    if found.profile:
        seconds, rows = found.profile
        for operation, calls, own in rows:
            print(f"{operation[:64]:66}{calls:6} calls{1e3 * own:9.1f} ms{100 * own / seconds:7.1f} %")
    return 0


def generate_command(given: argparse.Namespace) -> int:
    """Measure and print `tools/benchmark.py generate`."""
    import shutil

    from megacm3.inference.benchmark import BATCH, benchmark_generate

    work = _new_folder(given.work)
    try:
        timing = benchmark_generate(work, given.codes, given.rounds, _say)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for name in timing.rounds:
        rate, warm = timing.rate(name), timing.warm_up[name]
        print(f"{name:28} {rate:6.1f} steps/s, {rate * timing.megabytes / 1e3:5.1f} GB/s (first call {warm:.1f} s)")
    peer, together = timing.best_peer, BATCH * timing.ratio("megacm3", f"megacm3, {BATCH} at once")
    print(f"one image: {100 * timing.ratio('ceiling', 'megacm3'):.0f} % of the memory's ceiling")
    print(f"one image: {timing.ratio(peer, 'megacm3'):.2f} x as fast as {peer}")
    print(f"guided: {timing.ratio('megacm3, guided', 'megacm3'):.2f} x the time of one stream")
    print(f"int8: {timing.ratio('megacm3', 'megacm3, int8'):.2f} x as fast")
    print(f"{BATCH} at once: {together:.2f} x the throughput of {BATCH} in turn")
    return 0
