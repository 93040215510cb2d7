"""Show what fine-tuning changed: two models' answers to the held-out documents of a fine-tuning store."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run
from megacm3.files import check_output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--base", required=True, metavar="HF_DIR", help="the model before fine-tuning")
    add("--tuned", required=True, metavar="HF_DIR", help="the model after it")
    add("--store", required=True, metavar="STORE", help="held-out documents with answers (tools/pretokenize.py --sft)")
    add("--output", required=True, metavar="DIR", help="for report.html, samples.png and answers.json")
    add("--run", default="", metavar="DIR", help="the fine-tuning's folder, for its curve")
    add("--count", type=int, default=64, help="documents of each task (default %(default)s)")
    add(
        "--alike",
        default="",
        metavar="REGEX",
        help="struck from keys: documents equal then are the alternatives among which a picture is told (default: all)",
    )
    add("--seed", type=int, default=0, help="of documents and pictures drawn (default %(default)s)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default %(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse, ask both, write, print the figures."""
    given = _parser().parse_args(arguments)
    check_output(given.output)

    from megacm3.errors import ConfigError

    if given.count < 1:
        raise ConfigError(f"--count {given.count}; expected at least 1")

    from megacm3.evaluation.tuning_report import compare_models, write_tuning_report

    options = {"count": given.count, "alike": given.alike, "seed": given.seed, "device": given.device}
    found, generator = compare_models(given.base, given.tuned, given.store, **options)
    write_tuning_report(found, generator, Path(given.output), given.run)
    for task, row in found.figures().items():
        base, tuned = row["base"], row["tuned"]
        print(
            f"{task}: right {base['right']:.1%} -> {tuned['right']:.1%} (chance {row['chance']:.1%}), "
            + (f"words {base['words']:.1%} -> {tuned['words']:.1%}, " if "words" in base else "")
            + f"loss {base['loss']:.3f} -> {tuned['loss']:.3f} nats a token, {row['questions']} documents"
        )
    print(f"report: {Path(given.output) / 'report.html'}")
    return 0


if __name__ == "__main__":
    run(main)
