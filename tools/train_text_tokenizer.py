"""Train the text tokenizer on captions and texts, or take over Chameleon's released one."""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megacm3.command import progress, run
from megacm3.errors import ConfigError
from megacm3.files import check_output


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--input", nargs="+", metavar="GLOB", help="tars (their captions), parquet, jsonl, txt, data set folders")
    add("--vocab-size", type=int, metavar="N", help="text ids of CM3Leon (56320), all ids of Chameleon (65536)")
    add("--output", required=True, metavar="DIR", help="tokenizer folder to make")
    add("--family", choices=("cm3leon", "chameleon"), default="cm3leon", help="sentencepiece, or Chameleon's table")
    add("--from-json", metavar="FILE", help="Chameleon's released tokenizer JSON instead of training")
    add("--max-lines", type=int, default=10_000_000, help="lines sampled at most (default %(default)s)")
    add("--text-filter", action="append", default=[], metavar="NAME", help="datatrove's filter for WARC and txt")
    add("--overwrite", action="store_true", help="replace a tokenizer made from other inputs or settings")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse, train or take over, say what was made."""
    given = _parser().parse_args(arguments)
    check_output(given.output)
    if bool(given.input) == bool(given.from_json):
        raise ConfigError("give either --input with texts or --from-json with a tokenizer")
    family = "chameleon" if given.from_json else given.family
    size = given.vocab_size or (65536 if family == "chameleon" else 0)
    if size < 1:
        raise ConfigError(f"--vocab-size is {given.vocab_size or 'missing'}; expected 1 or more (56320 in CM3Leon)")
    for flag, value in (("--vocab-size", size), ("--max-lines", given.max_lines)):
        if not 1 <= value < 2**31:
            raise ConfigError(f"{flag} {value}; expected 1 to {2**31 - 1}")

    from megacm3.data.sources import find_shards, identify, iter_texts
    from megacm3.files import sha256_file
    from megacm3.tokenizers.chameleon_text import read_released, train_chameleon
    from megacm3.tokenizers.text import TextTokenizer, finished, save_chameleon, train_text_tokenizer

    text = read_released(given.from_json) if given.from_json else ""
    shards = find_shards(given.input) if given.input else []
    inputs = {"json": sha256_file(given.from_json)} if text else {"texts": identify(shards)}
    settings = {"format": "chameleon" if family == "chameleon" else "sentencepiece", "vocab_size": size}
    if family == "cm3leon":
        settings["max_lines"] = given.max_lines
    if given.text_filter:
        settings["text_filters"] = given.text_filter
    if finished(given.output, settings, inputs, overwrite=given.overwrite):
        print(f"{given.output} is finished already: same inputs and size ({TextTokenizer.load(given.output).size} ids)")
        return 0
    rejects: Counter[str] = Counter()
    read = iter_texts(shards, lambda row: rejects.update([row.reason]), tuple(given.text_filter))
    texts = progress(read, unit=" texts", description="read") if shards else []
    if family == "chameleon":
        text = text or train_chameleon(texts, size)
        tokenizer = save_chameleon(
            text, size, given.output, settings=settings, inputs=inputs, overwrite=given.overwrite
        )
    else:
        further = {"text_filters": given.text_filter} if given.text_filter else {}
        tokenizer = train_text_tokenizer(
            texts,
            size,
            given.output,
            max_lines=given.max_lines,
            inputs=inputs,
            further=further,
            overwrite=given.overwrite,
        )
    reasons = ", ".join(f"{count} {reason}" for reason, count in rejects.most_common())
    skipped = f"; {rejects.total()} rows without usable text skipped ({reasons})" if rejects else ""
    print(f"{given.output}: {tokenizer.size} ids, {tokenizer.pieces} of them in use{skipped}")
    return 0


if __name__ == "__main__":
    run(main)
