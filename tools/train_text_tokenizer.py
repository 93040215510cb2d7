"""Train a sentencepiece text tokenizer on captions and texts."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import progress, run


def main(arguments: list[str] | None = None) -> int:
    """Parse, train, say what was made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="GLOB", help="tars (captions), parquet, jsonl, txt"
    )
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="text ids (56320 in CM3Leon)")
    parser.add_argument("--output", required=True, metavar="DIR", help="tokenizer folder to make")
    parser.add_argument("--max-lines", type=int, default=10_000_000, help="lines sampled at most (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer made from other inputs")
    given = parser.parse_args(arguments)

    from megacm3.data.sources import find_shards, identify, iter_texts
    from megacm3.tokenizers.text import TextTokenizer, finished, train_text_tokenizer

    shards = find_shards(given.input)
    inputs = {"texts": identify(shards)}
    if finished(given.output, given.vocab_size, given.max_lines, inputs, overwrite=given.overwrite):
        tokenizer = TextTokenizer.load(given.output)
        print(f"{given.output} is finished already: same inputs and size ({tokenizer.size} ids)")
        return 0
    rejects: list[object] = []
    texts = progress(iter_texts(shards, rejects.append), unit=" texts", description="read")
    tokenizer = train_text_tokenizer(
        texts, given.vocab_size, given.output, max_lines=given.max_lines, inputs=inputs, overwrite=given.overwrite
    )
    skipped = f"; {len(rejects)} rows without usable text skipped" if rejects else ""
    print(f"{given.output}: {tokenizer.size} ids, {tokenizer.pieces} of them trained{skipped}")
    return 0


if __name__ == "__main__":
    run(main)
