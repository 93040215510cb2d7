"""Hits of a search for people: a table in words, and a sheet of pictures with their captions."""

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from megacm3.errors import DataError
from megacm3.files import new_file
from megacm3.retrieval.bank import MemoryBank
from megacm3.retrieval.embed import read_documents

_TILE, _LINE, _MARGIN, _COLUMNS = 160, 14, 8, 5


def hits_of(bank: MemoryBank, scores: Any, doc_ids: Any) -> list[dict[str, Any]]:
    """The hits of one query, best first: `META_FIELDS`, and their score as `match`."""
    kept = [(float(score), int(doc)) for score, doc in zip(scores, doc_ids, strict=True) if doc >= 0]
    described = bank.describe([doc for _, doc in kept])
    return [row | {"match": score} for row, (score, _) in zip(described, kept, strict=True)]


def draw_hits(hits: list[dict[str, Any]], inputs: tuple[str, ...], output: str | Path, query: str) -> None:
    """Write a PNG of the hits' pictures, read from the original input, under the words of the query.

    Raises DataError when the input is not what the bank was made from, or there is no hit.
    """
    if not hits:
        raise DataError("there is no hit to draw")
    pictures = dict(read_documents(inputs, hits))
    columns = min(_COLUMNS, len(hits))
    rows = -(-len(hits) // columns)
    tall = _TILE + 3 * _LINE + _MARGIN
    size = (columns * (_TILE + _MARGIN) + _MARGIN, rows * tall + 2 * _LINE + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    draw.text((_MARGIN, _MARGIN), _shorten(query, size[0] // 6), "black", font)
    for number, hit in enumerate(hits):
        left = _MARGIN + number % columns * (_TILE + _MARGIN)
        top = 2 * _LINE + _MARGIN + number // columns * tall
        sheet.paste(_fit(pictures[number]), (left, top))
        draw.text((left, top + _TILE), f"{hit['match']:.3f}  document {hit['doc_id']}", "gray", font)
        for line, text in enumerate(_wrap(hit["caption"], _TILE // 6)[:2]):
            draw.text((left, top + _TILE + (line + 1) * _LINE), text, "black", font)
    with new_file(output) as temporary:
        sheet.save(temporary, "PNG")


def _fit(picture: Image.Image) -> Image.Image:
    scale = _TILE / max(picture.size)
    sides = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    tile = Image.new("RGB", (_TILE, _TILE), "white")
    tile.paste(picture.convert("RGB").resize(sides, Image.Resampling.LANCZOS))
    return tile


def _shorten(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(" ".join(text.split()), width) or [""]
