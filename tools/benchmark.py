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

from megacm3 import benchmarks
from megacm3.command import run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = _command(
        commands, "convert", benchmarks.convert_command, "export and import of random weights; the gate timed apart"
    )
    add("--preset", default="cm3leon_7b", help="default %(default)s")
    add("--tensor", type=int, default=4, metavar="T", help="default %(default)s")
    add("--pipeline", type=int, default=2, metavar="P", help="default %(default)s")
    _add_work(add)
    add = _command(
        commands, "pretokenize", benchmarks.pretokenize_command, "512-pixel JPEGs through a 64-pixel encoder"
    )
    add("--pictures", type=int, default=8000, help="default %(default)s")
    add("--rounds", type=int, default=3, help="default %(default)s")
    _add_work(add)
    add = _command(
        commands,
        "loader",
        benchmarks.loader_command,
        "a store of 100M documents; packing, CM3, three retrieved documents each",
    )
    add("--rounds", type=int, default=3, help="default %(default)s")
    _add_work(add)
    add = _command(
        commands, "checkpoint", benchmarks.checkpoint_command, "background saves in turns with dd conv=fsync"
    )
    add("--rounds", type=int, default=7, help="default %(default)s")
    _add_work(add)
    add = _command(
        commands, "retrieval", benchmarks.retrieval_command, "a memory bank of jittered pairs beside bare FAISS"
    )
    add("--input", nargs="+", default=["examples/data/*.tar"], metavar="GLOB|DATASET", help="captioned pictures")
    add("--documents", type=int, default=1_000_000, help="default %(default)s")
    add("--queries", type=int, default=10_000, help="of each kind, from pairs held out (default %(default)s)")
    add("--width", type=int, default=512, help="of the vectors (default %(default)s)")
    add("--index", default="IVF4096,SQ8", metavar="FACTORY", help="default %(default)s")
    add("--encoder-steps", type=int, default=300, help="training steps of the CLIP (default %(default)s)")
    add("--seed", type=int, default=0)
    add("--only", nargs="+", default=[], metavar="PHASE", help="these phases; run the command again for the others")
    add("--work", default="benchmark", metavar="DIR", help="files and figures (5 GB); finished phases are kept there")
    add = _command(
        commands, "train", benchmarks.train_command, "one process on the CPU; a trunk of 25.7M, vocabulary 65,536, fp32"
    )
    add("--rounds", type=int, default=12, help="steps of each program, alternated; default %(default)s")
    add("--profile", type=int, default=0, metavar="N", help="list the N costliest operations of a step")
    add("overrides", nargs="*", metavar="key=value", help="for example train.global_batch=8")
    add = _command(
        commands,
        "generate",
        benchmarks.generate_command,
        "one process on the CPU; a random export of 0.5 GB, fp32 and int8",
    )
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


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    given = _parser().parse_args(arguments)
    code: int = given.function(given)
    return code


if __name__ == "__main__":
    run(main)
