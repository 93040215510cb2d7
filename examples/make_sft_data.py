"""Makes the fine-tuning records of examples/data from the full emoji tar: captions, questions, edits, text to image.

    python examples/make_sft_data.py --source fluent-emoji-00000.tar [--output examples/data]

Writes sft-train.parquet and sft-heldout.parquet: one record a row (`task` as in examples/configs/sft_tasks.yaml, the
task's fields, `images` in the order of its pictures). A figure (one code point in all its skin tones) is in one of the
two files alone, and what examples/make_data.py holds out is held out here too. The source and the licences are those of
make_data.py; the same source, Pillow and pyarrow give the same bytes.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from make_data import CATEGORIES, HELD_OUT, fraction, read_samples, small_picture

from megacm3.command import run
from megacm3.errors import DataError

PEOPLE = "People & Body"
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
PER_CATEGORY = 48
"""Pictures of each other category, so that questions about the category have all the answers."""
FIGURES = 170
SOURCES = 2
"""Pictures that each picture is made from in an edit, of the four other tones of its figure."""
MORE_HELD_OUT = 0.12
"""Of figures that the quickstart has not trained on."""
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "task", "caption", "question", "answer", "instruction")]
    + [("images", pa.list_(pa.binary()))]
)


def figure(key: str) -> str:
    """The code points without skin tones."""
    return re.sub(r"-1f3f[b-f]", "", key)


def held_out(key: str, category: str) -> bool:
    """By the figure alone; of the quickstart's categories only what the quickstart holds out."""
    return fraction("heldout", figure(key)) < (HELD_OUT if category in CATEGORIES else MORE_HELD_OUT)


def tone_of(about: dict[str, Any]) -> str | None:
    """light ... dark; None without a tone or with two people's."""
    tone = (about["skin_tone"] or "").removesuffix(" skin tone")
    return tone if tone in TONES else None


def chosen(samples: dict[str, dict[str, bytes]]) -> dict[str, dict[str, Any]]:
    """key -> category and tone of the pictures to use: figures in all five tones, and some of every other category."""
    about = {key: json.loads(sample["json"]) for key, sample in samples.items()}
    tones: dict[str, int] = defaultdict(int)
    for key, entry in about.items():
        tones[figure(key)] += tone_of(entry) is not None
    whole = sorted((name for name, count in tones.items() if count == len(TONES)), key=lambda n: fraction("figure", n))
    figures = set(whole[:FIGURES])
    taken: dict[str, int] = defaultdict(int)
    kept = {}
    for key in sorted(about, key=lambda key: fraction("order", key)):
        entry, tone = about[key], tone_of(about[key])
        if entry["category"] == PEOPLE:
            use = figure(key) in figures and (tone is not None or not entry["skin_tone"])
        else:
            use = not entry["skin_tone"] and taken[entry["category"]] < PER_CATEGORY
            taken[entry["category"]] += use
        if use:
            kept[key] = {"category": entry["category"], "tone": tone}
    return kept


def records(samples: dict[str, dict[str, bytes]], about: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The records of the pictures `about`, whose figures are whole."""
    pictures = {key: small_picture(samples[key]["webp"]) for key in about}
    by_figure: dict[str, dict[str, str]] = defaultdict(dict)
    for key, entry in about.items():
        if entry["tone"]:
            by_figure[figure(key)][entry["tone"]] = key
    people = 0
    for key, entry in about.items():
        caption, images = samples[key]["txt"].decode().strip(), [pictures[key]]
        yield {"key": f"{key}:caption", "task": "emoji-caption", "caption": caption, "images": images}
        yield {"key": f"{key}:image", "task": "emoji-image", "caption": caption, "images": images}
        asked = {"question": "What is the category?", "answer": entry["category"].lower()}
        people += entry["category"] == PEOPLE
        # One person in six: else nearly every answer would be the same.
        if entry["category"] != PEOPLE or people % 6 == 0:
            yield {"key": f"{key}:category", "task": "emoji-question", "images": images} | asked
        if entry["category"] == PEOPLE:
            asked = {"question": "What is the skin tone?", "answer": entry["tone"] or "none"}
            yield {"key": f"{key}:tone", "task": "emoji-question", "images": images} | asked
        if entry["tone"]:
            others = [tone for tone in TONES if tone != entry["tone"]]
            for tone in sorted(others, key=lambda tone: fraction(tone, key))[:SOURCES]:
                before = by_figure[figure(key)][tone]
                edit = {"key": f"{before}>{key}", "task": "emoji-edit", "images": [pictures[before], pictures[key]]}
                yield edit | {"instruction": f"Change the skin tone to {entry['tone']}"}


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="webdataset tar with KEY.webp, KEY.txt and KEY.json")
    folder = Path(__file__).resolve().parent / "data"
    parser.add_argument("--output", type=Path, default=folder, help="folder of the records (default: examples/data)")
    arguments = parser.parse_args(given)

    samples = read_samples(arguments.source)
    about = chosen(samples)
    if not about:
        raise DataError(f"--source {arguments.source} has no pictures with skin tones")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, wanted in (("train", False), ("heldout", True)):
        kept = {key: entry for key, entry in about.items() if held_out(key, entry["category"]) == wanted}
        rows = list(records(samples, kept))
        path = arguments.output / f"sft-{name}.parquet"
        # One dictionary of pictures for the whole file: each is stored once, however many records show it.
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        options = {"dictionary_pagesize_limit": 1 << 26, "data_page_size": 1 << 24}
        pq.write_table(table, path, row_group_size=len(rows), compression="zstd", **options)
        print(f"{path}: {len(rows)} records of {len(kept)} pictures, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main)
