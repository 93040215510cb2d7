"""Stores without files, for measuring the stream and for trying settings: documents in memory, or made up by number."""

from collections.abc import Sequence

import numpy as np

from megacm3.data.documents import IMAGE, TEXT, Document, Segment


class MemoryStore:
    """Documents held in a list; their numbers are their places."""

    def __init__(self, documents: Sequence[Sequence[Segment]]) -> None:
        self._documents = [Document(i, tuple(segments)) for i, segments in enumerate(documents)]

    def __len__(self) -> int:
        return len(self._documents)

    def document(self, doc_id: int) -> Document:
        """Document `doc_id`."""
        return self._documents[doc_id]

    def segment_lengths(self, doc_id: int) -> list[tuple[int, int]]:
        """(mode, length) of each segment."""
        return list(self._documents[doc_id].shape)


class SyntheticStore:
    """Any number of caption-picture pairs: each reads its ids from a place in one array that its number decides."""

    def __init__(self, size: int, tokens: np.ndarray, image_tokens: int, captions: tuple[int, int]) -> None:
        """tokens: any 1-D integer array, memory-mapped or not, of values that are text ids as well as codes.

        captions: shortest and longest caption.
        """
        self._size, self._tokens, self._image_tokens, self._captions = size, tokens, image_tokens, captions

    def __len__(self) -> int:
        return self._size

    def _caption(self, doc_id: int) -> int:
        low, high = self._captions
        return low + (doc_id * 2654435761 >> 7) % (high - low + 1)

    def segment_lengths(self, doc_id: int) -> list[tuple[int, int]]:
        """(mode, length) of the caption and of the picture."""
        return [(TEXT, self._caption(doc_id)), (IMAGE, self._image_tokens)]

    def document(self, doc_id: int) -> Document:
        """The pair `doc_id`."""
        caption = self._caption(doc_id)
        start = doc_id * 40503 % (len(self._tokens) - caption - self._image_tokens)
        values = self._tokens[start : start + caption + self._image_tokens].astype(np.int64)
        return Document(doc_id, (Segment(TEXT, values[:caption]), Segment(IMAGE, values[caption:])))


class RandomNeighbours:
    """Stands in for retrieval: `count` other documents, drawn anew for each sample."""

    def __init__(self, size: int, count: int) -> None:
        self._size, self._count = size, count

    def sample(self, doc_id: int, rng: np.random.Generator) -> list[int]:
        """`count` document numbers."""
        return rng.integers(0, self._size, self._count).tolist()
