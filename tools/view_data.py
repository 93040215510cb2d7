"""Write one HTML page to look at a token store: pictures, captions, packed sequences, neighbours, statistics."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run
from megacm3.errors import ConfigError
from megacm3.files import check_output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="key=value arguments override the config, such as data.packing=blocks"
    )
    add = parser.add_argument
    add("store", metavar="STORE", help="folder made by pretokenize.py")
    add("overrides", nargs="*", metavar="key=value", help="config keys that shape the sequences")
    add("--output", default="view_data.html", metavar="HTML", help="where to write the page (default %(default)s)")
    add("--config", metavar="YAML", help="a trainer's config: shows the sequences of that run for this store")
    add("--neighbours", default="", metavar="DIR", help="folder made by find_neighbours.py")
    add("--text-tokenizer", default="", metavar="DIR", help="default: the folder text_tokenizer beside the store")
    add("--image-tokenizer", default="", metavar="DIR", help="default: the folder image_tokenizer beside the store")
    add("--documents", type=int, default=24, metavar="N", help="documents to show (default %(default)s)")
    add("--sequences", type=int, default=6, metavar="N", help="sequences to show (default %(default)s)")
    add("--seed", type=int, default=0, help="which documents are drawn (default %(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse, draw, write."""
    # Intermixed: key=value arguments may stand before, between and after the flags.
    given = _parser().parse_intermixed_args(arguments)
    check_output(given.output, file=True)
    for name in ("documents", "sequences"):
        if getattr(given, name) < 0:
            raise ConfigError(f"--{name} {getattr(given, name)}; expected 0 or more")
    if Path(given.output).suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output {given.output}: the page is HTML; give a name that ends in .html")

    from megacm3.evaluation.data_view import view_store
    from megacm3.files import new_file

    names = ("config", "overrides", "neighbours", "text_tokenizer", "image_tokenizer", "documents", "sequences", "seed")
    page = view_store(given.store, **{name: getattr(given, name) for name in names})
    with new_file(given.output) as path:
        path.write_text(page, encoding="utf-8")
    print(f"{given.output}: {len(page) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    run(main)
