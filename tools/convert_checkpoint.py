"""Convert between native checkpoints and Hugging Face folders, change a checkpoint's layout, or say what it holds."""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run
from megacm3.errors import ConfigError
from megacm3.files import check_output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="to-hf|from-hf|reshard|inspect")

    to_hf = commands.add_parser("to-hf", help="native checkpoint -> Hugging Face folder")
    to_hf.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a run's folder (its newest step) or one step"
    )
    to_hf.add_argument("--output", required=True, metavar="DIR")
    to_hf.add_argument("--dtype", default="", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    to_hf.add_argument("--max-shard-size", type=float, default=5.0, metavar="GB", help="default %(default)s")
    to_hf.add_argument("--text-tokenizer", default="", metavar="DIR", help="default: the run's")
    to_hf.add_argument("--image-tokenizer", default="", metavar="DIR", help="default: the run's")
    to_hf.add_argument(
        "--adapter",
        default="",
        metavar="BASE",
        help="write the low-rank adapters alone, in PEFT's form, over model BASE",
    )
    to_hf.add_argument("--overwrite", action="store_true", help="replace an earlier export once the new one is whole")

    from_hf = commands.add_parser("from-hf", help="Hugging Face folder -> native checkpoint")
    from_hf.add_argument(
        "--model", required=True, metavar="DIR", help="of transformers' form, or Meta's consolidated.*.pth"
    )
    from_hf.add_argument("--extend-vocab", type=int, default=0, metavar="N", help="add N ids, with average rows")
    from_hf.add_argument(
        "--trust-pickle", action="store_true", help="read .pth files, which can run code of their maker"
    )

    reshard = commands.add_parser("reshard", help="native checkpoint -> the same in another layout")
    reshard.add_argument("--checkpoint", required=True, metavar="DIR")

    for command in (from_hf, reshard):
        command.add_argument(
            "--output",
            required=True,
            metavar="DIR",
            help="step folder to make; to train from it: RUN/checkpoints/step_NNNNNN",
        )
        command.add_argument("--tensor", type=int, default=1, metavar="T", help="tensor parallel files (default 1)")
        command.add_argument("--pipeline", type=int, default=1, metavar="P", help="pipeline stages (default 1)")
    for command in (to_hf, from_hf):
        command.add_argument("--no-gate", action="store_true", help="skip the comparison of logits (says so)")

    inspect = commands.add_parser("inspect", help="what a checkpoint holds")
    inspect.add_argument("--checkpoint", required=True, metavar="DIR")
    inspect.add_argument("--verify", action="store_true", help="hash every file")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse, convert, compare, say what was made."""
    given = _parser().parse_args(arguments)
    if given.command != "inspect":
        check_output(given.output)
    for name in ("tensor", "pipeline"):
        if getattr(given, name, 1) < 1:
            raise ConfigError(f"--{name} {getattr(given, name)}; expected at least 1")
    if not 0 < getattr(given, "max_shard_size", 1.0) < float("inf"):
        raise ConfigError(f"--max-shard-size {given.max_shard_size}; expected gigabytes above 0")

    from megacm3.convert import commands

    lines: dict[str, Any] = {
        "to-hf": commands.to_hf_command,
        "from-hf": commands.from_hf_command,
        "reshard": commands.reshard_command,
        "inspect": commands.inspect_command,
    }
    for line in lines[given.command](given):
        print(line)
    return 0


if __name__ == "__main__":
    run(main)
