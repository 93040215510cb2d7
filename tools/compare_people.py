"""People compare two models' answers without knowing which is whose: make the page, count the votes."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run
from megacm3.files import check_output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    page = commands.add_parser("page", help="a page for annotators, and the key that tells what it hides")
    add = page.add_argument
    add("--answers", required=True, nargs=2, metavar="JSONL", help="of the two models: key, prompt, text, images, task")
    add("--names", nargs=2, metavar="NAME", help="of the models, for the results (default: the files' names)")
    add("--output", required=True, metavar="HTML", help="the page; HTML.key.json beside it is not for annotators")
    add("--seed", type=int, default=0, help="of sides and order (default %(default)s)")
    add("--title", default="Which answer is better?")
    count = commands.add_parser("count", help="win rates from the annotators' files")
    add = count.add_argument
    add("--key", required=True, metavar="JSON", help="HTML.key.json of the page")
    add("--votes", required=True, nargs="+", metavar="JSON", help="one file an annotator")
    add("--annotators", type=int, default=3, help="that a pair should have; fewer are told (default %(default)s)")
    add("--output", metavar="JSON", help="also write the result to this file")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse, then make the page or count."""
    given = _parser().parse_args(arguments)
    if given.output is not None:
        check_output(given.output, file=True)
    return _page(given) if given.command == "page" else _count(given)


def _page(given: argparse.Namespace) -> int:
    from megacm3.evaluation.blind_page import write_blind_page

    names = tuple(given.names or (Path(path).stem for path in given.answers))
    page, key = write_blind_page(tuple(given.answers), names, given.output, seed=given.seed, title=given.title)
    print(f"page: {page} ({page.stat().st_size / 2**20:.1f} MiB), to be given to annotators")
    print(f"key: {key}, to be kept until the votes are counted")
    return 0


def _count(given: argparse.Namespace) -> int:
    from megacm3.evaluation.votes import count_votes, read_votes, table
    from megacm3.files import write_json

    models, judged, people = read_votes(given.key, given.votes)
    result = {"models": models, "annotators": people} | count_votes(models, judged, given.annotators)
    for row in table(models, result):
        print(" | ".join(row))
    agreement = ", ".join(
        f"{name} {'-' if value is None else f'{value:.3f}'}" for name, value in result["agreement"].items()
    )
    print(f"{len(people)} annotators; agreement: {agreement}")
    if result["pairs_with_fewer_annotators"]:
        print(f"{result['pairs_with_fewer_annotators']} pairs have fewer than {given.annotators} annotators")
    if given.output:
        write_json(given.output, result)
    return 0


if __name__ == "__main__":
    run(main)
