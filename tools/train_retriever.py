"""Train a small CLIP bi-encoder on image+caption pairs, or train an existing one further."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run
from megacm3.files import check_output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="GLOB", help="tars, parquet, jsonl or data set folders of pairs")
    add("--output", required=True, metavar="DIR", help="CLIP folder to make")
    add("--base", default="", metavar="DIR", help="CLIP folder to train further; its sizes count")
    add("--image-size", type=int, default=48, metavar="PIXELS", help="side of the pictures (default %(default)s)")
    add("--patch-size", type=int, default=8, metavar="PIXELS", help="default %(default)s")
    add("--width", type=int, default=128, help="hidden size and width of the vectors (default %(default)s)")
    add("--image-layers", type=int, default=3, help="default %(default)s")
    add("--text-layers", type=int, default=2, help="default %(default)s")
    add("--text-tokens", type=int, default=32, help="longest text in tokens (default %(default)s)")
    add("--vocabulary", type=int, default=1536, help="most tokens of the tokenizer (default %(default)s)")
    add("--steps", type=int, default=300, help="default %(default)s")
    add("--batch", type=int, default=128, help="default %(default)s")
    add("--lr", type=float, default=0.0, help="peak learning rate (default 1e-3, or 1e-5 with --base)")
    add("--limit", type=int, default=200_000, help="pairs read at most (default %(default)s)")
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="cpu or cuda")
    add("--overwrite", action="store_true", help="replace an encoder made from other inputs or settings")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse, train, say what was made."""
    given = vars(_parser().parse_args(arguments))
    check_output(given["output"])

    from megacm3.retrieval.new_encoder import EncoderTraining
    from megacm3.retrieval.train_encoder import EncoderOptions, make_encoder

    given["lr"] = given["lr"] or (1e-5 if given["base"] else 1e-3)
    names = [name for name in EncoderTraining.__dataclass_fields__ if name in given]
    report = make_encoder(
        EncoderOptions(
            inputs=tuple(given["input"]),
            output=given["output"],
            training=EncoderTraining(**{name: given[name] for name in names}),
            base=given["base"],
            limit=given["limit"],
            device=given["device"],
            overwrite=given["overwrite"],
        )
    )
    time = f"in {report.seconds:.0f} s" if report.seconds else "finished already"
    figures = report.figures
    print(
        f"{given['output']}: vectors of width {report.dim} from {report.pairs} pairs, {time}; found first of all "
        f"documents: {figures['recall_image']:.1%} by picture, {figures['recall_text']:.1%} by caption"
    )
    return 0


if __name__ == "__main__":
    run(main)
