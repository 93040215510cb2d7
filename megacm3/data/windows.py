"""Windows of the stream: which samples, with which retrieved documents, go into which sequences.

A window is planned from lengths and neighbour lists alone; no token is read. Every random number is keyed by the number
of a sample or of the window's first sample.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from megacm3.command import seed_from
from megacm3.data import cm3
from megacm3.data.documents import Document, Layout, Shape
from megacm3.data.mixture import Mixture
from megacm3.data.packing import Packed, blocks_needed, fit_whole, pack_blocks, pack_whole
from megacm3.errors import DataError

PROBES = 4
"""Windows whose fill is averaged to fix the number of sequences of a window."""


class StoreLike(Protocol):
    """What the stream needs of a token store."""

    def __len__(self) -> int: ...
    def document(self, doc_id: int) -> Document: ...
    def segment_lengths(self, doc_id: int) -> Sequence[tuple[int, int]]: ...


class SamplerLike(Protocol):
    """What the stream needs of retrieval."""

    def sample(self, doc_id: int, rng: np.random.Generator) -> Sequence[int]: ...


@dataclass(frozen=True)
class Source:
    """One store of the mixture, and where its retrieved documents come from."""

    name: str
    """The store's folder, for messages and reports."""
    store: StoreLike
    sampler: SamplerLike | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    """What identifies its content (fingerprints), for the stream's fingerprint."""


@dataclass(frozen=True)
class StreamSettings:
    """What shapes the stream beside the stores."""

    sequence_length: int
    """L: a sequence has L + 1 tokens, of which L are inputs and L are targets."""
    seed: int = 0
    packing: str = "whole"
    """blocks | whole."""
    rotation: float = 0.0
    """Probability that the pictures of a sample's pairs stand before their captions."""
    document_mask: bool = False
    """Rearrange each sample on its own, for attention that does not cross samples."""
    spans: float = 1.0
    """Mean of the Poisson number of CM3 spans; 0 = causal."""
    whole_segment: float = 0.5
    """Probability that the spans are whole segments."""
    answers_only: bool = False
    """Loss on answers only."""
    turns: bool = False
    """`<end-of-turn>` between prompts and answers."""


class Drawn(NamedTuple):
    """A sample before its tokens are read."""

    number: int
    source: int
    documents: tuple[int, ...]
    """Retrieved documents, then the sample's own."""
    rotated: bool
    length: int
    """Tokens with control tokens, without what CM3 adds."""
    spans: int
    """CM3 spans of the sample, or of the sequence that it opens."""
    left_out: int
    """Retrieved documents left out because they did not fit."""
    left_out_tokens: int
    unplaced_spans: int
    """CM3 spans that were drawn but found no room beside a document that nearly fills a sequence."""


COUNTERS = (
    "tokens",
    "padding",
    "cut",
    "cut_samples",
    "spans",
    "samples",
    "retrieved",
    "left_out",
    "left_out_documents",
    "unplaced_spans",
)
"""Of each sequence. tokens: real ones, CM3's included. padding: the rest of L + 1. cut, cut_samples: the surplus of the
window, booked on its last sequence. samples: those that begin here; retrieved: documents in front of them; left_out,
left_out_documents: tokens and number of the retrieved documents that did not fit; unplaced_spans: CM3 spans that found
no room beside a document."""


@dataclass(frozen=True)
class Plan:
    """A window: its samples and which of their tokens go to which sequence."""

    drawn: list[Drawn]
    packed: Packed
    counts: dict[str, np.ndarray] = field(repr=False)
    """int64 [sequences] of each of COUNTERS."""


def keyed(*key: int | str) -> np.random.Generator:
    """The generator of one key: the same numbers on every rank and worker, whatever was drawn before."""
    return np.random.Generator(np.random.PCG64(seed_from(*key)))


class Windows:
    """Plans windows by the number of their first sample."""

    def __init__(
        self, sources: Sequence[Source], mixture: Mixture, layout: Layout, settings: StreamSettings, samples: int
    ) -> None:
        """samples: of a window."""
        self.sources, self.mixture, self.layout, self.settings = tuple(sources), mixture, layout, settings
        self.samples = samples
        self.size = settings.sequence_length + 1
        """Tokens of a sequence."""
        self.per_sample = settings.document_mask and settings.spans > 0
        """Whether samples are rearranged before they are packed, each on its own."""
        self.draw = lru_cache(maxsize=PROBES)(self._draw_window)
        self.plan = lru_cache(maxsize=4)(self._plan_window)

    def sequences(self, first_sample: int) -> int:
        """Sequences that a window of the stage beginning at `first_sample` fills, the mean of a few."""
        filled = []
        for probe in range(PROBES):
            drawn = self.draw(first_sample + probe * self.samples)
            lengths, spans = self._sizes(drawn)
            if self.settings.packing == "whole":
                filled.append(float(len(fit_whole(lengths, self.size, spans))))
            else:
                filled.append(blocks_needed(lengths, self.size, 0 if self.per_sample else self.settings.spans))
        return max(1, int(sum(filled) / PROBES))

    def _draw_window(self, first: int) -> list[Drawn]:
        settings = self.settings
        stores, documents, _ = self.mixture.lookup(first, self.samples)
        draws = keyed("spans", settings.seed, first).poisson(settings.spans, self.samples)
        numbers = range(first, first + self.samples)
        columns = zip(numbers, stores.tolist(), documents.tolist(), draws.tolist(), strict=True)
        return [self._draw_sample(*row) for row in columns]

    def _draw_sample(self, number: int, source: int, doc_id: int, spans: int) -> Drawn:
        settings, store, sampler = self.settings, self.sources[source].store, self.sources[source].sampler
        retrieved: tuple[int, ...] = ()
        rotated = False
        if sampler is not None or settings.rotation > 0:
            rng = keyed("sample", settings.seed, number)
            rotated = bool(rng.random() < settings.rotation)
            retrieved = tuple(sampler.sample(doc_id, rng)) if sampler is not None else ()
        shapes = [tuple(store.segment_lengths(other)) for other in (*retrieved, doc_id)]
        length = self.layout.length(shapes)
        spans = min(spans, self.layout.vocabulary.sentinels)
        left_out = left_out_tokens = unplaced = 0
        if settings.packing == "whole" and length + 3 * spans > self.size:
            room = self._fit(source, doc_id, shapes, spans)
            unplaced, spans, kept, full = spans - room, room, [len(shapes) - 1], length
            for i in reversed(range(len(retrieved))):
                if self.layout.length([shapes[i], *(shapes[k] for k in kept)]) + 3 * spans <= self.size:
                    kept.insert(0, i)
            left_out, shapes = len(shapes) - len(kept), [shapes[i] for i in kept]
            retrieved = tuple(retrieved[i] for i in kept[:-1])
            length = self.layout.length(shapes)
            left_out_tokens = full - length
        content = sum(count for shape in shapes for _, count in shape)
        spans = min(spans, cm3.span_limit(content, self.layout.vocabulary))
        return Drawn(number, source, (*retrieved, doc_id), rotated, length, spans, left_out, left_out_tokens, unplaced)

    def _fit(self, source: int, doc_id: int, shapes: list[Shape], spans: int) -> int:
        """Spans for which the sample's own document has room. Raises DataError when it is too long without any."""
        own = self.layout.length(shapes[-1:])
        if own > self.size:
            raise DataError(
                f"document {doc_id} of {self.sources[source].name} makes {own} tokens; a sequence holds {self.size} "
                "(model.sequence_length + 1) and data.packing = whole never cuts a sample; "
                "raise model.sequence_length or set data.packing = blocks"
            )
        return min(spans, (self.size - own) // 3)

    def _sizes(self, drawn: list[Drawn]) -> tuple[np.ndarray, np.ndarray]:
        """What packing needs: tokens of each sample, and spans that are still to be added when it is packed."""
        lengths = np.array([sample.length for sample in drawn], np.int64)
        spans = np.array([sample.spans for sample in drawn], np.int64)
        return (lengths + 3 * spans, 0 * spans) if self.per_sample else (lengths, spans)

    def _plan_window(self, first: int, sequences: int) -> Plan:
        settings = self.settings
        drawn = self.draw(first)
        lengths, spans = self._sizes(drawn)
        rng = keyed("window", settings.seed, first)
        if settings.packing == "whole":
            packed = pack_whole(lengths, self.size, spans, sequences, rng)
        else:
            mean = 0.0 if self.per_sample else settings.spans
            # At least a third of a block's tokens are no control tokens: the shortest sample is `</s> a </s>`.
            limit = cm3.span_limit(self.size // 3, self.layout.vocabulary)
            packed = pack_blocks(lengths, self.size, np.minimum(rng.poisson(mean, sequences), limit))
        return Plan(drawn, packed, self._count(drawn, packed))

    def _count(self, drawn: list[Drawn], packed: Packed) -> dict[str, np.ndarray]:
        rows = []
        for pieces, spans in zip(packed.pieces, packed.spans, strict=True):
            begun = [drawn[piece.sample] for piece in pieces if piece.start == 0]
            tokens = sum(piece.stop - piece.start for piece in pieces) + 3 * spans
            spans = sum(sample.spans for sample in begun) if self.per_sample else spans
            retrieved = sum(len(sample.documents) - 1 for sample in begun)
            lost = [(sample.left_out_tokens, sample.left_out, sample.unplaced_spans) for sample in begun]
            lost_sums = (sum(column) for column in zip(*lost, strict=True)) if lost else (0, 0, 0)
            rows.append((tokens, self.size - tokens, 0, 0, spans, len(begun), retrieved, *lost_sums))
        table = np.array(rows, np.int64).T
        table[2:4, -1] = packed.cut, packed.cut_samples
        return dict(zip(COUNTERS, table, strict=True))


def default_window(documents: int) -> int:
    """Samples of a window: 1,024, or for fewer documents whole passes over them, at least 256 samples."""
    return 1024 if documents >= 1024 else documents * -(-256 // max(1, documents))


def add_counts(rows: Iterable[dict[str, int]]) -> dict[str, int]:
    """The sum of counters of several sequences."""
    total = dict.fromkeys(COUNTERS, 0)
    for row in rows:
        for name, value in row.items():
            total[name] += value
    return total
