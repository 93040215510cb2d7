"""Documents as typed segments, and how they become one sample of token ids (layouts of CM3Leon and Chameleon)."""

from dataclasses import dataclass

import numpy as np

TEXT, IMAGE = 0, 1
"""Kinds of a segment; the store's modes."""


@dataclass(frozen=True)
class Segment:
    """One run of text ids or the codes of one picture, without any control token."""

    kind: int
    """TEXT or IMAGE."""
    tokens: np.ndarray
    """int64 [n]: text ids, or raw codes 0..codebook_size-1."""
    answer: bool = False
    """Fine-tuning: part of an answer, so that it bears loss under `loss_on: answers`."""


@dataclass(frozen=True)
class Document:
    """One stored sample: a caption and its picture, a text, or any interleaving of texts and pictures."""

    doc_id: int
    """Global number in its store."""
    segments: tuple[Segment, ...]
