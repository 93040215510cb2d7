"""Measure on this machine: convert = export and import at a model's real size, beside plain copies of its bytes."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="export and import of random weights, without the gate of logits")
    convert.add_argument("--preset", default="cm3leon_7b", help="default %(default)s")
    convert.add_argument("--tensor", type=int, default=4, metavar="T", help="default %(default)s")
    convert.add_argument("--pipeline", type=int, default=2, metavar="P", help="default %(default)s")
    convert.add_argument("--work", default="benchmark", metavar="DIR", help="where the files go, removed afterwards")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    given = _parser().parse_args(arguments)

    from megacm3.convert.benchmark import convert

    timings = convert(
        Path(given.work), given.preset, given.tensor, given.pipeline, lambda line: print(line, flush=True)
    )
    seconds = {timing.name: timing.seconds for timing in timings}
    copied = seconds["copy of the checkpoint"]
    for name in ("export", "import"):
        print(f"{name}: {seconds[name] / copied:.2f} x the time of a copy")
    return 0


if __name__ == "__main__":
    run(main)
