"""From a record's fields to the parts of a document: text and pictures in order, and which of them are the answer."""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megacm3.command import seed_from
from megacm3.data.images import Reject
from megacm3.data.sources import clean_text
from megacm3.sft.tasks import Item, Task, parse

GRID = 256
"""Boxes are written in pixels 0..255 of the square picture, whatever its size (CM3Leon, figure 15)."""


@dataclass(frozen=True)
class Part:
    """Text or the bytes of a picture file; `answer` where it is part of the answer."""

    content: str | bytes
    answer: bool = False


def choose_template(task: Task, fields: Mapping[str, Any], key: str, seed: int = 0) -> int:
    """The template for a record: drawn by `seed` and the record's key among those whose fields it has.

    Raises Reject: missing_field, with the names.
    """
    usable = usable_templates(task, fields)
    return usable[seed_from("template", seed, task.name, key) % len(usable)]


def usable_templates(task: Task, fields: Mapping[str, Any]) -> list[int]:
    """Templates that the record's fields fill; those that need an absent optional field are passed over.

    Raises Reject: missing_field.
    """
    present = {name for name, value in fields.items() if value is not None}
    needed = [task.fields(number) for number in range(len(task.templates))]
    missing = set().union(*needed) - present - set(task.optional)
    usable = [number for number, names in enumerate(needed) if names <= present]
    if missing or not usable:
        names = missing or set().union(*needed) - present
        raise Reject("missing_field", f"task {task.name} needs {', '.join(sorted(names))}; has {', '.join(fields)}")
    return usable


def render(task: Task, template: int, fields: Mapping[str, Any], way: str) -> list[Part]:
    """The parts of a record by one template of its task, in the order of `way` (tasks.WAYS).

    fields: text as str, numbers and lists as `text_of` takes them, pictures as bytes. Values are put in once, so that
    braces or marks in them stay text. Raises Reject: wrong_kind, empty_text, nul_in_text, invalid_utf8, bad_box.
    """
    parts: list[Part] = []
    for segment in parse(task.templates[template]):
        if len(segment) == 1 and segment[0].field in task.pictures:
            parts.append(_picture(task, segment[0].field, fields))
        else:
            parts += _texts(task, segment, fields)
    if way != "cm3leon":
        parts = _answer_last(parts)
    return _tidy(parts, spaces=way != "chameleon")


def _picture(task: Task, name: str, fields: Mapping[str, Any]) -> Part:
    value = fields[name]
    if not isinstance(value, bytes):
        raise Reject("wrong_kind", f"field {name} of task {task.name} is a {type(value).__name__}; expected a picture")
    return Part(value, name in task.answers)


def _texts(task: Task, segment: Sequence[Item], fields: Mapping[str, Any]) -> list[Part]:
    marks = [i for i, item in enumerate(segment) if item.field in task.answers]
    first, last = (marks[0], marks[-1]) if marks else (len(segment), -1)
    texts = ["", "", ""]
    for i, item in enumerate(segment):
        value = text_of(task, item.field, fields) if item.field else item.text
        texts[0 if i < first else 1 if i <= last else 2] += value
    return [Part(text, i == 1) for i, text in enumerate(texts) if text]


def text_of(task: Task, name: str, fields: Mapping[str, Any]) -> str:
    """A field as clean text; `objects` as names at locations, other lists as options (A) ... (B) ...

    Raises Reject.
    """
    value = fields[name]
    if name == "objects":
        return _objects(task, fields)
    if isinstance(value, list):
        return " ".join(f"({chr(65 + i)}) {clean_text(str(option))}" for i, option in enumerate(value))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Reject("wrong_kind", f"field {name} of task {task.name} is a {type(value).__name__}; expected text")
    return clean_text(str(value))


def _objects(task: Task, fields: Mapping[str, Any]) -> str:
    """`cat at location (3, 5) -> (99, 120), dog at ...`: {"name", "box": [left, top, right, bottom]} in file pixels."""
    picture = next((fields[name] for name in task.pictures if isinstance(fields.get(name), bytes)), None)
    if not isinstance(fields["objects"], list) or picture is None:
        raise Reject("wrong_kind", "objects is no list of {name, box} beside a picture")
    size, texts = _picture_size(picture), []
    for item in fields["objects"]:
        try:
            name, box = clean_text(str(item["name"])), [float(value) for value in item["box"]]
        except (KeyError, TypeError, ValueError) as fault:
            raise Reject("bad_box", f"{item}: expected name and box of four numbers") from fault
        placed = place_box(box, size)
        if placed is not None:
            texts.append(f"{name} at location ({placed[0]}, {placed[1]}) -> ({placed[2]}, {placed[3]})")
    if not texts:
        raise Reject("bad_box", "no object lies in the square that is left of the picture")
    return ", ".join(texts)


def place_box(box: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """A box in a file's pixels, moved with the centre crop to the 256 x 256 square; None if nothing of it is left.

    Raises Reject: bad_box, for other than four numbers with left < right and top < bottom.
    """
    if len(box) != 4 or not (-math.inf < box[0] < box[2] < math.inf and -math.inf < box[1] < box[3] < math.inf):
        raise Reject("bad_box", f"{list(box)}; expected left, top, right, bottom")
    scale = GRID / min(size)
    offsets = [(side * scale - GRID) / 2 for side in size] * 2
    moved = [min(GRID - 1, max(0, round(value * scale - offset))) for value, offset in zip(box, offsets, strict=True)]
    left, top, right, bottom = moved
    return (left, top, right, bottom) if left < right and top < bottom else None


def _picture_size(data: bytes) -> tuple[int, int]:
    import io

    from PIL import Image

    try:
        return Image.open(io.BytesIO(data)).size
    except (OSError, ValueError, SyntaxError, struct.error) as fault:
        raise Reject("corrupt_image", str(fault)) from fault


def _answer_last(parts: list[Part]) -> list[Part]:
    """Pictures behind the answer go to the front; text behind it (a full stop) is left away."""
    last = max(i for i, part in enumerate(parts) if part.answer)
    return [part for part in parts[last + 1 :] if isinstance(part.content, bytes)] + parts[: last + 1]


def _tidy(parts: list[Part], spaces: bool) -> list[Part]:
    """The space before a text answer belongs to it (`spaces`, as sentencepiece has it) or to nobody."""
    tidy: list[Part] = []
    for part in parts:
        content, before = part.content, tidy[-1] if tidy else None
        if isinstance(content, str) and part.answer and before and isinstance(before.content, str):
            stripped = before.content.rstrip(" ")
            if spaces:
                content = before.content[len(stripped) :] + content
            tidy[-1] = Part(stripped if spaces else before.content.rstrip(), before.answer)
        tidy.append(Part(content, part.answer))
    return [part for part in tidy if part.content]
