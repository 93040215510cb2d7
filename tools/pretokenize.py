"""Turn shards of image+caption pairs, texts, interleaved documents or fine-tuning records into a token store."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import pairs, run
from megacm3.errors import ConfigError
from megacm3.files import check_output

if TYPE_CHECKING:
    from megacm3.sft.read import SftOptions

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
    add(
        "--mode",
        choices=("crop", "pad"),
        help="centre crop, or white border (default: crop; pad with --way chameleon, whose answers are cropped)",
    )
    add("--min-side", type=int, default=32, help="reject smaller pictures (default %(default)s)")
    add("--max-aspect", type=float, default=4.0, help="reject longer pictures (default %(default)s)")
    add("--max-pixels", type=int, default=64_000_000, help="reject larger pictures undecoded (default %(default)s)")
    add("--max-reject-rate", type=float, default=0.05, metavar="R", help="fail above this share (default %(default)s)")
    add("--allow-partial", action="store_true", help="take what is readable of damaged shards")
    add("--text-filter", action="append", default=[], metavar="NAME", help=FILTERS)
    add("--max-tokens", type=int, default=0, metavar="N", help="reject longer documents (default: none is too long)")
    add("--rows-per-unit", type=int, default=10_000, help="rows of a data set in one unit (default %(default)s)")
    add("--overwrite", action="store_true", help="replace a store made from other inputs or settings")
    add(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="partition, time, cpus_per_task, mem_per_cpu_gb, or an sbatch option",
    )
    _add_sft(parser)
    return parser


def _add_sft(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "fine-tuning", "records of tasks in jsonl, parquet or a data set, or a release's files"
    )
    add = group.add_argument
    add("--sft", default="", metavar="TASK", help="a task of megacm3/sft/tasks.yaml, or mixed: records name theirs")
    add("--sft-tasks", default="", metavar="YAML", help="further tasks, in the form of megacm3/sft/tasks.yaml")
    add("--way", default="", help="cm3leon, image-first or chameleon (default: the family of the text tokenizer)")
    add("--variants", default="one", help="one template drawn for each record, or all (default %(default)s)")
    add("--images", default="", metavar="DIR", help="pictures that records name (default: the input file's folder)")
    add("--field", action="append", default=[], metavar="FIELD=COLUMN", help="what the records call a field")
    add("--split", default="train", help="of a release whose files hold several (default %(default)s)")
    add("--sft-seed", type=int, default=0, help="which templates are drawn (default %(default)s)")


def _sft_options(given: argparse.Namespace) -> "SftOptions | None":
    if not given.sft:
        if given.sft_tasks or given.way or given.field:
            raise ConfigError("--sft-tasks, --way and --field need --sft TASK")
        return None

    from megacm3.sft.read import make_options

    fields = pairs("--field", given.field)
    chosen = (given.sft, given.sft_tasks, given.way, given.variants, given.sft_seed, given.split)
    return make_options(*chosen, fields, given.text_tokenizer)


def main(arguments: list[str] | None = None) -> int:
    """Parse, run or continue the job, say what was made."""
    given = _parser().parse_args(arguments)
    check_output(given.output)
    slurm = pairs("--slurm", given.slurm)
    sft = _sft_options(given)

    from megacm3.data.executors import ExecutorOptions
    from megacm3.data.pretokenize import PretokenizeOptions, pretokenize
    from megacm3.data.units import UnitSettings

    settings = UnitSettings(
        given.mode or ("pad" if sft is not None and sft.way == "chameleon" else "crop"),
        given.batch,
        given.max_pixels,
        given.min_side,
        given.max_aspect,
        given.allow_partial,
        tuple(given.text_filter),
        given.max_tokens,
        sft,
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
            images=given.images,
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
