"""Find the neighbours of every document of a memory bank, by its picture and by its caption, for training."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import pairs, run
from megacm3.files import check_output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--bank", required=True, help="made by tools/build_memory_bank.py")
    add("--encoder", default="", metavar="DIR", help="CLIP folder for text queries (default: the bank's own copy)")
    add("--queries", default="", metavar="BANK", help="bank whose documents ask (a held-out store's; default: --bank)")
    add("--held-out", nargs="+", default=[], metavar="BANK", help="copies of what these hold are never drawn")
    add("--output", required=True, metavar="NEIGHBOURS", help="unfinished work lies in NEIGHBOURS.work")
    add("--keep", type=int, default=16, metavar="K", help="candidates kept in each list (default %(default)s)")
    add("--search", type=int, default=64, metavar="K", help="candidates looked at (default %(default)s)")
    add("--text-variants", type=int, default=2, metavar="V", help="text queries a document (default %(default)s)")
    add("--query-dropout", type=float, default=0.2, metavar="P", help="share of dropped tokens (default %(default)s)")
    add("--alike", type=float, default=0.9, metavar="S", help="candidates more alike are not drawn together")
    add("--duplicate", type=float, default=0.98, metavar="S", help="documents this alike count as copies")
    add("--block", type=int, default=0, metavar="N", help="documents a unit (default: by size)")
    add("--workers", type=int, default=0, help="units at once (default: 1 for a small bank, else one a core)")
    add("--executor", choices=("local", "slurm", "ray"), default="local")
    add("--slurm", nargs="+", default=[], metavar="KEY=VALUE", help="partition=NAME and other options of sbatch")
    add("--device", default="cpu", help="where text queries are encoded: cpu or cuda")
    add(
        "--verify", choices=("none", "size", "sha256"), default="sha256", help="check of the bank (default %(default)s)"
    )
    add("--seed", type=int, default=0)
    add("--overwrite", action="store_true", help="replace neighbours made from another bank or other settings")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse, run or continue the job, say what was made."""
    given = _parser().parse_args(arguments)
    check_output(given.output)

    from megacm3.retrieval.find_neighbours import find_neighbours
    from megacm3.retrieval.options import NeighbourOptions

    given.output = given.output.rstrip("/")
    names = NeighbourOptions.__dataclass_fields__
    given.slurm = pairs("--slurm", given.slurm)
    given.held_out = tuple(given.held_out)
    options = NeighbourOptions(**{name: value for name, value in vars(given).items() if name in names})
    report = find_neighbours(options, given.verify)
    time = f"in {report.seconds:.1f} s" if report.seconds else "finished already"
    print(
        f"{given.output}: {report.documents} documents, {report.with_image} with candidates by picture, "
        f"{report.with_text} by caption; {report.copies} have copies (largest cluster {report.largest_cluster}); {time}"
    )
    return 0


if __name__ == "__main__":
    run(main)
