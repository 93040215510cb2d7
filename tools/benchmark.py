"""Measure on this machine, always beside something simpler in the same run.

convert     export and import at a model's real size, beside plain copies of its bytes
pretokenize pictures to codes on all cores, beside the bare decoding and encoding of a picture
loader      packed sequences a second, from 100M documents
checkpoint  a background save of 2.1 GB, beside dd
retrieval   recall, speed and memory of a memory bank, beside bare FAISS with the same index
train       a step of the trainer, beside loops over transformers' class and megatron-core's layers
generate    the decoder, beside the memory's ceiling and transformers
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run
from megacm3.errors import ConfigError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = _command(commands, "convert", _convert, "export and import of random weights; the gate timed apart")
    add("--preset", default="cm3leon_7b", help="default %(default)s")
    add("--tensor", type=int, default=4, metavar="T", help="default %(default)s")
    add("--pipeline", type=int, default=2, metavar="P", help="default %(default)s")
    _add_work(add)
    add = _command(commands, "pretokenize", _pretokenize, "512-pixel JPEGs through a 64-pixel encoder")
    add("--pictures", type=int, default=8000, help="default %(default)s")
    add("--rounds", type=int, default=3, help="default %(default)s")
    _add_work(add)
    add = _command(
        commands, "loader", _loader, "a store of 100M documents; packing, CM3, three retrieved documents each"
    )
    add("--rounds", type=int, default=3, help="default %(default)s")
    _add_work(add)
    add = _command(commands, "checkpoint", _checkpoint, "background saves in turns with dd conv=fsync")
    add("--rounds", type=int, default=7, help="default %(default)s")
    _add_work(add)
    add = _command(commands, "retrieval", _retrieval, "a memory bank of jittered pairs beside bare FAISS")
    add("--input", nargs="+", default=["examples/data/*.tar"], metavar="GLOB|DATASET", help="captioned pictures")
    add("--documents", type=int, default=1_000_000, help="default %(default)s")
    add("--queries", type=int, default=10_000, help="of each kind, from pairs held out (default %(default)s)")
    add("--width", type=int, default=512, help="of the vectors (default %(default)s)")
    add("--index", default="IVF4096,SQ8", metavar="FACTORY", help="default %(default)s")
    add("--encoder-steps", type=int, default=300, help="training steps of the CLIP (default %(default)s)")
    add("--seed", type=int, default=0)
    add("--only", nargs="+", default=[], metavar="PHASE", help="these phases; run the command again for the others")
    add("--work", default="benchmark", metavar="DIR", help="files and figures (5 GB); finished phases are kept there")
    add = _command(commands, "train", _train, "one process on the CPU; a trunk of 25.7M, vocabulary 65,536, fp32")
    add("--rounds", type=int, default=12, help="steps of each program, alternated; default %(default)s")
    add("--profile", type=int, default=0, metavar="N", help="list the N costliest operations of a step")
    add("overrides", nargs="*", metavar="key=value", help="for example train.global_batch=8")
    add = _command(commands, "generate", _generate, "one process on the CPU; a random export of 0.5 GB, fp32 and int8")
    add("--codes", type=int, default=64, help="of an image (default %(default)s)")
    add("--rounds", type=int, default=7, help="default %(default)s")
    _add_work(add)
    return parser


def _command(commands: Any, name: str, function: Any, text: str) -> Any:
    parser = commands.add_parser(name, help=text)
    parser.set_defaults(function=function)
    return parser.add_argument


def _add_work(add: Any) -> None:
    add("--work", default="benchmark", metavar="DIR", help="where the files go, removed afterwards")


def _new_folder(path: str) -> Path:
    if Path(path).exists():
        raise ConfigError(f"--work {path} exists already; it would be removed")
    return Path(path)


def _say(line: str) -> None:
    print(line, flush=True)


def _convert(given: argparse.Namespace) -> int:
    from megacm3.convert.benchmark import convert

    timings = convert(Path(given.work), given.preset, given.tensor, given.pipeline, _say)
    copies = [timing.seconds for timing in timings if timing.name.startswith("copy")]
    usual = sum(copies) / len(copies)
    for timing in timings:
        if timing.name in ("export", "import") or timing.name.startswith("export,"):
            print(f"{timing.name}: {timing.seconds / usual:.2f} x the time of a copy ({usual:.1f} s on average)")
    return 0


def _checkpoint(given: argparse.Namespace) -> int:
    import torch

    from megacm3.parallel.cpu import prepare
    from megacm3.train import environment

    prepare(torch.device("cpu"))
    environment(None)
    from megacm3.checkpoint.benchmark import benchmark_checkpoint

    timing = benchmark_checkpoint(_new_folder(given.work), given.rounds, _say)
    print(f"{timing.bytes / 1e9:.2f} GB: save {timing.save:.2f} s, stall {timing.stall:.2f} s, dd {timing.dd:.2f} s")
    print(f"save: {timing.save / timing.dd:.2f} x the time of dd")
    return 0


def _retrieval(given: argparse.Namespace) -> int:
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


def _pretokenize(given: argparse.Namespace) -> int:
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


def _loader(given: argparse.Namespace) -> int:
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


def _train(given: argparse.Namespace) -> int:
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


def _generate(given: argparse.Namespace) -> int:
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


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    given = _parser().parse_args(arguments)
    code: int = given.function(given)
    return code


if __name__ == "__main__":
    run(main)
