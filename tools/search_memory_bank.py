"""Search a memory bank for a text or a picture; print the hits, and draw them where the original input is given."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import run
from megacm3.files import check_output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--bank", required=True, help="made by tools/build_memory_bank.py")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="words to search for")
    what.add_argument("--image", metavar="FILE", help="picture to search for")
    add("-k", type=int, default=5, help="hits (default %(default)s)")
    add("--encoder", default="", metavar="DIR", help="CLIP folder (default: the bank's own copy)")
    add("--input", nargs="+", default=[], metavar="GLOB|DATASET", help="what the store was made from, to draw the hits")
    add("--output", default="", metavar="PNG", help="sheet of the hits to draw (with --input; default hits.png)")
    add("--device", default="cpu", help="cpu or cuda")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse, search, print and draw."""
    given = _parser().parse_args(arguments)
    if given.input:
        check_output(given.output or "hits.png", file=True)
    from megacm3.errors import ConfigError, DataError

    if given.output and not given.input:
        raise ConfigError("--output draws the hits' pictures, which are in --input: give what the store was made from")

    from megacm3.data.images import ImageLimits, Reject, open_image
    from megacm3.retrieval.bank import MemoryBank
    from megacm3.retrieval.encoder import Encoder
    from megacm3.retrieval.show import draw_hits, hits_of

    bank = MemoryBank.open(given.bank)
    encoder = Encoder.load(given.encoder, given.device) if given.encoder else bank.encoder(given.device)
    bank.check_encoder(encoder)
    if given.text is not None:
        query = encoder.encode_texts([given.text])
    else:
        try:
            query = encoder.encode_images([open_image(Path(given.image).read_bytes(), ImageLimits(min_side=1))])
        except (OSError, Reject) as fault:
            raise DataError(f"--image {given.image} cannot be read: {fault}") from fault
    scores, doc_ids = bank.search(query, min(given.k, len(bank)))
    hits = hits_of(bank, scores[0], doc_ids[0])
    for hit in hits:
        print(f"{hit['match']:.4f}  {hit['doc_id']:>8}  {hit['key']}  {' '.join(hit['caption'].split())}")
    if given.input:
        output = given.output or "hits.png"
        draw_hits(hits, tuple(given.input), output, given.text or given.image)
        print(f"drawn: {output}")
    return 0


if __name__ == "__main__":
    run(main)
