"""What goes into a `Generator` and what comes out of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from megacm3.data.documents import Document
from megacm3.tokenizers.text import TextTokenizer

Part: TypeAlias = str | np.ndarray
"""A text, or a picture as uint8 [s, s, 3] of the model's size."""
Prompt: TypeAlias = str | Sequence[Part]
Retrieved: TypeAlias = Sequence[Sequence[Document]]
"""For each prompt the documents to put in front (0-2 at inference in the paper)."""


@dataclass(frozen=True)
class Piece:
    """One item of a stream of results."""

    prompt: int
    """Number of the prompt."""
    sample: int
    """Number of its sample, 0..n-1."""
    kind: str
    """text (a piece of text), partial (a picture whose lower rows are still missing), image, or done."""
    text: str = ""
    pixels: np.ndarray | None = None
    """uint8 [s, s, 3]"""
    rows: int = 0
    """Of partial: rows of codes that are there."""


@dataclass(frozen=True)
class Wish:
    """One of a mixed batch."""

    kind: str
    """image (a picture that follows the prompt), caption (a text for the prompt, a picture) or complete."""
    prompt: Prompt | np.ndarray
    options: Mapping[str, Any] = field(default_factory=dict)
    """Those of `Generator.images`, `caption` or `stream`."""


class TextWriter:
    """Text from ids one by one: a character whose bytes are not all there yet is held back."""

    def __init__(self, tokenizer: TextTokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []

    def add(self, ids: Sequence[int]) -> str:
        self.ids += ids
        text = self.tokenizer.decode(self.ids)
        return "" if text.endswith("\ufffd") else self.flush()

    def flush(self) -> str:
        text = self.tokenizer.decode(self.ids)
        self.ids = []
        return text
