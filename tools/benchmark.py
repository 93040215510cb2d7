"""Measure on this machine.

convert = export and import at a model's real size, beside plain copies of its bytes. pretokenize = pictures to codes on
all cores, beside the bare decoding and encoding of a picture. checkpoint = a background save of 2.1 GB, beside dd.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run
from megacm3.errors import ConfigError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="export and import of random weights; the gate timed apart")
    convert.add_argument("--preset", default="cm3leon_7b", help="default %(default)s")
    convert.add_argument("--tensor", type=int, default=4, metavar="T", help="default %(default)s")
    convert.add_argument("--pipeline", type=int, default=2, metavar="P", help="default %(default)s")
    convert.add_argument("--work", default="benchmark", metavar="DIR", help="where the files go, removed afterwards")
    pretokenize = commands.add_parser("pretokenize", help="512-pixel JPEGs through a 64-pixel encoder")
    pretokenize.add_argument("--pictures", type=int, default=4000, help="default %(default)s")
    pretokenize.add_argument(
        "--work", default="benchmark", metavar="DIR", help="where the files go, removed afterwards"
    )
    checkpoint = commands.add_parser("checkpoint", help="background saves in turns with dd conv=fsync")
    checkpoint.add_argument("--rounds", type=int, default=7, help="default %(default)s")
    checkpoint.add_argument("--work", default="benchmark", metavar="DIR", help="where the files go, removed afterwards")
    return parser


def _checkpoint(given: argparse.Namespace) -> int:
    import torch

    from megacm3.parallel.cpu import prepare
    from megacm3.train import environment

    prepare(torch.device("cpu"))
    environment(None)
    from megacm3.checkpoint.benchmark import benchmark_checkpoint

    if Path(given.work).exists():
        raise ConfigError(f"--work {given.work} exists already; it would be removed")
    timing = benchmark_checkpoint(Path(given.work), given.rounds, lambda line: print(line, flush=True))
    print(f"{timing.bytes / 1e9:.2f} GB: save {timing.save:.2f} s, stall {timing.stall:.2f} s, dd {timing.dd:.2f} s")
    print(f"save: {timing.save / timing.dd:.2f} x the time of dd")
    return 0


def _pretokenize(given: argparse.Namespace) -> int:
    from megacm3.data.benchmark import benchmark_pretokenize

    if Path(given.work).exists():
        raise ConfigError(f"--work {given.work} exists already; it would be removed")
    timing = benchmark_pretokenize(Path(given.work), given.pictures)
    print(f"one thread: decoding {timing.decode * 1e3:.2f} ms, encoding {timing.encode * 1e3:.2f} ms a picture")
    print(f"{timing.cores} cores could give {timing.ceiling:.0f} pictures/s; the job gave {timing.rate:.0f}/s")
    print(f"pretokenize: {100 * timing.rate / timing.ceiling:.0f} % of what the cores can give")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    given = _parser().parse_args(arguments)
    if given.command == "pretokenize":
        return _pretokenize(given)
    if given.command == "checkpoint":
        return _checkpoint(given)

    from megacm3.convert.benchmark import convert

    timings = convert(
        Path(given.work), given.preset, given.tensor, given.pipeline, lambda line: print(line, flush=True)
    )
    copies = [timing.seconds for timing in timings if timing.name.startswith("copy")]
    usual = sum(copies) / len(copies)
    for timing in timings:
        if timing.name in ("export", "import") or timing.name.startswith("export,"):
            print(f"{timing.name}: {timing.seconds / usual:.2f} x the time of a copy ({usual:.1f} s on average)")
    return 0


if __name__ == "__main__":
    run(main)
