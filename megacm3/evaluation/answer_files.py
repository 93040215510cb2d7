"""Files of a model's answers: one JSON object a line, pictures beside them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megacm3.errors import DataError
from megacm3.files import new_file


@dataclass(frozen=True)
class AnswerRow:
    """What one model answered to one prompt: a line of the file, whose keys are these names."""

    key: str
    """Of the prompt, unique in the file."""
    prompt: str = ""
    text: str = ""
    """The answer's text."""
    images: tuple[str, ...] = ()
    """The answer's pictures: paths, relative to the file's folder."""
    prompt_images: tuple[str, ...] = ()
    task: str = ""
    """The prompt's category, by which results are also counted."""


def write_answers(path: str | Path, rows: Iterable[AnswerRow]) -> None:
    """One line a row."""
    with new_file(path) as temporary:
        text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text(text, encoding="utf-8")


def read_answers(path: str | Path) -> list[AnswerRow]:
    """The rows of a file. Raises DataError, with the line, for what is no answer or names a picture that is missing."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected a file of answers, one JSON object a line")
    rows: dict[str, AnswerRow] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        row = _row(line, f"{path} line {number}")
        if row.key in rows:
            raise DataError(f"{path} line {number}: key '{row.key}' is there twice; expected one answer a key")
        for image in (*row.images, *row.prompt_images):
            if not (path.parent / image).is_file():
                raise DataError(f"{path} line {number}: picture {path.parent / image} does not exist")
        rows[row.key] = row
    if not rows:
        raise DataError(f"{path} holds no answer; expected one JSON object a line")
    return list(rows.values())


def _row(line: str, where: str) -> AnswerRow:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as fault:
        raise DataError(f"{where} is not JSON: {fault}") from fault
    if not isinstance(found, dict) or not isinstance(found.get("key"), str):
        raise DataError(f"{where} has no 'key'; expected an object with key, prompt, and text or images")
    for name in ("prompt", "text", "task"):
        if not isinstance(found.get(name, ""), str):
            raise DataError(f"{where}: {name} is {found[name]!r}; expected a text")
    for name in ("images", "prompt_images"):
        if not _is_paths(found.get(name, [])):
            raise DataError(f"{where}: {name} is {found[name]!r}; expected a list of paths")
    if "text" not in found and "images" not in found:
        raise DataError(f"{where} has neither 'text' nor 'images'; an empty answer is written as an empty text")
    images, prompt_images = (tuple(found.get(name, ())) for name in ("images", "prompt_images"))
    prompt, text, task = (found.get(name, "") for name in ("prompt", "text", "task"))
    return AnswerRow(found["key"], prompt, text, images, prompt_images, task)


def _is_paths(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(path, str) for path in value)
