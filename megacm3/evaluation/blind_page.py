"""A page on which people compare two models' answers without knowing which is whose.

Chameleon's protocol (its human evaluation): for each answer, does it fulfil the task fully, partially or not; and which
of the two is better, or are they about the same; three people a pair. The page is one file without network. It holds
neither names nor what was drawn: which answer stands left is in a second file, which stays with whoever counts.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from megacm3.command import seed_from
from megacm3.errors import DataError
from megacm3.evaluation.answer_files import AnswerRow, read_answers
from megacm3.evaluation.pictures import png_bytes
from megacm3.files import new_file, write_json

SIDE = 768
"""Longest side in pixels of a picture on the page."""
SUFFIX = ".key.json"


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    first: AnswerRow
    second: AnswerRow
    swapped: bool
    """The second stands left."""


def pair_up(first: Sequence[AnswerRow], second: Sequence[AnswerRow], seed: int) -> list[Pair]:
    """The pairs in a drawn order; each model stands left in half of each task's. Raises DataError unless they match."""
    others = {row.key: row for row in second}
    missing = [row.key for row in first if row.key not in others] + sorted(others.keys() - {row.key for row in first})
    if missing:
        raise DataError(
            f"{len(missing)} prompts have an answer in one file only, such as '{missing[0]}'; "
            "expected the same keys in both"
        )
    for row in first:
        if (row.prompt, row.task) != (others[row.key].prompt, others[row.key].task):
            raise DataError(
                f"'{row.key}' has another prompt or task in each file; expected answers to the same prompts"
            )
    pairs = []
    for task in {row.task: None for row in first}:
        rows = sorted((row for row in first if row.task == task), key=lambda row: seed_from("side", seed, row.key))
        # Alternating along the drawn order; a bit a task decides where an odd number's extra one goes.
        turn = seed_from("side", seed, task) % 2
        pairs += [Pair(row, others[row.key], (place + turn) % 2 == 1) for place, row in enumerate(rows)]
    return sorted(pairs, key=lambda pair: seed_from("order", seed, pair.first.key))


def write_blind_page(
    files_of_answers: tuple[str | Path, str | Path],
    names: tuple[str, str],
    output: str | Path,
    *,
    seed: int = 0,
    title: str = "Which answer is better?",
) -> tuple[Path, Path]:
    """Write the page and, beside it, PAGE.key.json, which tells what it hides; returns both paths.

    names: of the two models, for the results. Raises DataError where the files do not match.
    """
    output = Path(output)
    if names[0] == names[1]:
        raise DataError(f"both models are called '{names[0]}'; expected two names")
    folders = tuple(Path(path).parent for path in files_of_answers)
    first, second = (read_answers(path) for path in files_of_answers)
    pairs = pair_up(first, second, seed)
    shown, secret = [], []
    for number, pair in enumerate(pairs):
        sides = [_shown(pair.first, folders[0]), _shown(pair.second, folders[1])]
        if pair.swapped:
            sides.reverse()
        pictures = [_data_url(folders[0] / image) for image in pair.first.prompt_images]
        prompt = {"text": pair.first.prompt, "images": pictures}
        shown.append({"task": pair.first.task, "prompt": prompt, "left": sides[0], "right": sides[1]})
        left = names[1] if pair.swapped else names[0]
        secret.append({"pair": number, "key": pair.first.key, "task": pair.first.task, "left": left})
    payload = json.dumps(shown, ensure_ascii=False, sort_keys=True)
    page_hash = hashlib.sha256(payload.encode()).hexdigest()
    with new_file(output) as temporary:
        temporary.write_text(_render(title, payload, page_hash), encoding="utf-8")
    key = output.with_name(output.name + SUFFIX)
    write_json(key, {"page": page_hash, "models": list(names), "seed": seed, "pairs": secret})
    return output, key


def _render(title: str, payload: str, page_hash: str) -> str:
    from jinja2 import Environment

    template = files("megacm3.evaluation").joinpath("blind_page.html").read_text(encoding="utf-8")
    # Inside a script element only `<` can end it or begin a comment; the rest of JSON is inert.
    inert = payload.replace("<", "\\u003c")
    return Environment(autoescape=True).from_string(template).render(title=title, payload=inert, page=page_hash)


def _shown(row: AnswerRow, folder: Path) -> dict[str, Any]:
    return {"text": row.text, "images": [_data_url(folder / image) for image in row.images]}


def _data_url(path: Path) -> str:
    """The picture anew as PNG, so that neither metadata nor the format tells where it came from."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as fault:
        raise DataError(f"picture {path} cannot be read: {fault}") from fault
    picture.thumbnail((SIDE, SIDE))
    # From the pixels alone: a picture's own notes, such as a program's name, stay behind.
    return "data:image/png;base64," + base64.b64encode(png_bytes(np.asarray(picture))).decode()
