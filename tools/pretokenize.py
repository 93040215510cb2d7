"""Turn shards of image+caption pairs, texts or interleaved documents into a token store."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run
from megacm3.errors import ConfigError

FILTERS = "datatrove's filter for texts alone: gopher-quality, gopher-repetition, c4-quality or fineweb-quality"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="GLOB|DATASET",
        help="tars, parquet, jsonl, txt, or a data set folder",
    )
    add("--text-tokenizer", required=True, metavar="DIR")
    add("--image-tokenizer", required=True, metavar="DIR")
    add("--output", required=True, metavar="STORE", help="store to make; unfinished work lies in STORE.work")
    add("--executor", choices=("local", "slurm", "ray"), default="local")
    add("--workers", type=int, default=0, help="shards at once (default: one a core, or one a GPU)")
    add(
        "--threads",
        type=int,
        default=0,
        help="threads that decode pictures in each worker (default: a share of the cores)",
    )
    add("--device", default="cpu", help="cpu, cuda (each worker its own GPU) or cuda:N")
    add("--batch", type=int, default=32, help="pictures encoded at once (default %(default)s)")
    add("--mode", choices=("crop", "pad"), default="crop", help="centre crop, or white border")
    add("--min-side", type=int, default=32, help="reject smaller pictures (default %(default)s)")
    add("--max-aspect", type=float, default=4.0, help="reject longer pictures (default %(default)s)")
    add("--max-pixels", type=int, default=64_000_000, help="reject larger pictures undecoded (default %(default)s)")
    add("--max-reject-rate", type=float, default=0.05, metavar="R", help="fail above this share (default %(default)s)")
    add("--allow-partial", action="store_true", help="take what is readable of damaged shards")
    add("--text-filter", action="append", default=[], metavar="NAME", help=FILTERS)
    add("--rows-per-unit", type=int, default=10_000, help="rows of a data set in one unit (default %(default)s)")
    add("--overwrite", action="store_true", help="replace a store made from other inputs or settings")
    add(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="partition, time, cpus_per_task, mem_per_cpu_gb, or an sbatch option",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse, run or continue the job, say what was made."""
    given = _parser().parse_args(arguments)
    slurm = dict(pair.partition("=")[::2] for pair in given.slurm)
    if any(not value for value in slurm.values()):
        raise ConfigError(f"--slurm {' '.join(given.slurm)}; expected KEY=VALUE")

    from megacm3.data.executors import ExecutorOptions
    from megacm3.data.pretokenize import PretokenizeOptions, pretokenize
    from megacm3.data.units import UnitSettings

    settings = UnitSettings(
        given.mode,
        given.batch,
        given.max_pixels,
        given.min_side,
        given.max_aspect,
        given.allow_partial,
        tuple(given.text_filter),
    )
    report = pretokenize(
        PretokenizeOptions(
            inputs=tuple(given.input),
            text_tokenizer=given.text_tokenizer,
            image_tokenizer=given.image_tokenizer,
            output=given.output,
            settings=settings,
            where=ExecutorOptions(given.executor, given.workers, given.threads, given.device, slurm),
            max_reject_rate=given.max_reject_rate,
            rows_per_unit=given.rows_per_unit,
            overwrite=given.overwrite,
        )
    )
    if report.submitted:
        print(f"{report.submitted}; run the same command again when it is done, to put the store together")
        return 0
    rejects = ", ".join(f"{count} {reason}" for reason, count in sorted(report.rejects.items())) or "none"
    rate = (
        f" in {report.seconds:.1f} s ({report.documents / report.seconds:.0f}/s)"
        if report.seconds
        else " (finished already)"
    )
    print(f"{given.output}: {report.documents} documents, {report.tokens} tokens{rate}; rejects: {rejects}")
    return 0


if __name__ == "__main__":
    run(main)
