"""The global stream of packed sequences: a pure function of (settings, stores, position).

Sequence n lies in window n // sequences; a window takes a fixed number of samples of the mixture and fills a fixed
number of sequences from them (packing.py). So any position is reached by planning one window, which reads lengths and
neighbour lists but no token; and every random number is keyed by the number of a sample, a sequence or a window.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from megacm3.command import seed_from
from megacm3.data import cm3
from megacm3.data.documents import Document, Layout, Shape, rotate
from megacm3.data.mixture import Mixture
from megacm3.data.packing import Packed, blocks_needed, fit_whole, pack_blocks, pack_whole
from megacm3.errors import DataError
from megacm3.files import sha256_json
from megacm3.tokenizers.vocabulary import Vocabulary

VERSION = 1
"""Of the stream's definition: raised whenever the same settings would give other sequences."""
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


@dataclass(frozen=True)
class PackedSequence:
    """One packed and rearranged sequence of L + 1 tokens."""

    number: int
    tokens: np.ndarray
    """int64 [L + 1]."""
    loss_mask: np.ndarray
    """bool [L]: which targets (tokens[1:]) bear loss."""
    documents: np.ndarray
    """int32 [L]: index, within the sequence, of the sample at each input position; -1 at padding."""
    samples: tuple[int, ...]
    """Global numbers of the samples in it."""


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
)
"""Of each sequence. tokens: real ones, CM3's included. padding: the rest of L + 1. cut, cut_samples: the surplus of the
window, booked on its last sequence. samples: those that begin here; retrieved: documents in front of them; left_out,
left_out_documents: tokens and number of the retrieved documents that did not fit."""


@dataclass(frozen=True)
class Plan:
    """A window: its samples and which of their tokens go to which sequence."""

    drawn: list[Drawn]
    packed: Packed
    counts: dict[str, np.ndarray] = field(repr=False)
    """int64 [sequences] of each of COUNTERS."""


@dataclass(frozen=True)
class WindowStage:
    """A stretch of the stream with windows of one shape."""

    first_sequence: int
    first_sample: int
    documents: int
    """Samples of a window."""
    sequences: int
    """Sequences of a window."""


def _rng(*key: int | str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed_from(*key)))


class Stream:
    """Packed sequences by number. Build it with `megacm3.data.loader.build_stream`, or from parts as here."""

    def __init__(
        self,
        sources: Sequence[Source],
        mixture: Mixture,
        vocabulary: Vocabulary,
        settings: StreamSettings,
        window: int = 0,
    ) -> None:
        """window: samples of a window, 0 = `default_window`. The last stage of `mixture` never ends.

        Stages of `mixture` must begin at multiples of the window. Raises DataError when a document does not fit.
        """
        self.sources, self.mixture, self.vocabulary, self.settings = tuple(sources), mixture, vocabulary, settings
        self.window = window or default_window(sum(mixture.sizes))
        self._layout = Layout(vocabulary, settings.turns)
        self._size = settings.sequence_length + 1
        self._control = cm3.is_control(vocabulary)
        self._per_sample = settings.document_mask and settings.spans > 0
        self._draw = lru_cache(maxsize=PROBES)(self._draw_window)
        self._plan = lru_cache(maxsize=4)(self._plan_window)
        self._sample = lru_cache(maxsize=2)(self._read_sample)
        self.stages = self._stages()

    def _stages(self) -> tuple[WindowStage, ...]:
        stages: list[WindowStage] = []
        for stage in self.mixture.stages:
            assert stage.first % self.window == 0, (stage.first, self.window)
            windows = (stage.first - stages[-1].first_sample) // self.window if stages else 0
            first = stages[-1].first_sequence + windows * stages[-1].sequences if stages else 0
            stages.append(WindowStage(first, stage.first, self.window, self._sequences_from(stage.first)))
        return tuple(stages)

    def _sequences_from(self, first_sample: int) -> int:
        """Sequences that a window of the stage beginning at `first_sample` fills, the mean of a few."""
        filled = []
        for probe in range(PROBES):
            drawn = self._draw(first_sample + probe * self.window)
            lengths, spans = self._sizes(drawn)
            if self.settings.packing == "whole":
                filled.append(float(len(fit_whole(lengths, self._size, spans))))
            else:
                filled.append(blocks_needed(lengths, self._size, 0 if self._per_sample else self.settings.spans))
        return max(1, int(sum(filled) / PROBES))

    @cached_property
    def description(self) -> dict[str, Any]:
        """All that the sequences depend on, as JSON; equal descriptions give equal streams."""
        return {
            "version": VERSION,
            "settings": dataclasses.asdict(self.settings),
            "vocabulary": self.vocabulary.fingerprint,
            "window": self.window,
            "seed": self.mixture.seed,
            "stages": [
                dataclasses.asdict(stage) | {"weights": list(mixed.weights)}
                for stage, mixed in zip(self.stages, self.mixture.stages, strict=True)
            ],
            "stores": [source.origin | {"documents": len(source.store)} for source in self.sources],
        }

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of `description`; a checkpoint keeps it, so that a resumed run reads the same stream."""
        return sha256_json(self.description)

    def locate(self, number: int) -> tuple[int, int, int]:
        """(stage, first sample of the window, index in the window) of sequence `number`."""
        assert number >= 0
        at = max(i for i, stage in enumerate(self.stages) if stage.first_sequence <= number)
        stage = self.stages[at]
        window, index = divmod(number - stage.first_sequence, stage.sequences)
        return at, stage.first_sample + window * stage.documents, index

    # ---- planning: lengths only

    def _draw_window(self, first: int) -> list[Drawn]:
        settings = self.settings
        stores, documents, _ = self.mixture.lookup(first, self.window)
        draws = _rng("spans", settings.seed, first).poisson(settings.spans, self.window)
        numbers = range(first, first + self.window)
        columns = zip(numbers, stores.tolist(), documents.tolist(), draws.tolist(), strict=True)
        return [self._draw_sample(*row) for row in columns]

    def _draw_sample(self, number: int, source: int, doc_id: int, spans: int) -> Drawn:
        settings, store, sampler = self.settings, self.sources[source].store, self.sources[source].sampler
        retrieved: tuple[int, ...] = ()
        rotated = False
        if sampler is not None or settings.rotation > 0:
            rng = _rng("sample", settings.seed, number)
            rotated = bool(rng.random() < settings.rotation)
            retrieved = tuple(sampler.sample(doc_id, rng)) if sampler is not None else ()
        shapes = [tuple(store.segment_lengths(other)) for other in (*retrieved, doc_id)]
        length = self._layout.length(shapes)
        spans = min(spans, self.vocabulary.sentinels)
        left_out = left_out_tokens = 0
        if settings.packing == "whole" and length + 3 * spans > self._size:
            spans, kept, full = self._fit(source, doc_id, shapes, spans), [len(shapes) - 1], length
            for i in reversed(range(len(retrieved))):
                if self._layout.length([shapes[i], *(shapes[k] for k in kept)]) + 3 * spans <= self._size:
                    kept.insert(0, i)
            left_out, shapes = len(shapes) - len(kept), [shapes[i] for i in kept]
            retrieved = tuple(retrieved[i] for i in kept[:-1])
            length = self._layout.length(shapes)
            left_out_tokens = full - length
        content = sum(count for shape in shapes for _, count in shape)
        spans = min(spans, cm3.span_limit(content, self.vocabulary))
        return Drawn(number, source, (*retrieved, doc_id), rotated, length, spans, left_out, left_out_tokens)

    def _fit(self, source: int, doc_id: int, shapes: list[Shape], spans: int) -> int:
        """Spans for which the sample's own document has room. Raises DataError when it is too long without any."""
        own = self._layout.length(shapes[-1:])
        if own > self._size:
            raise DataError(
                f"document {doc_id} of {self.sources[source].name} makes {own} tokens; a sequence holds {self._size} "
                "(model.sequence_length + 1) and data.packing = whole never cuts a sample; "
                "raise model.sequence_length or set data.packing = blocks"
            )
        return min(spans, (self._size - own) // 3)

    def _sizes(self, drawn: list[Drawn]) -> tuple[np.ndarray, np.ndarray]:
        """What packing needs: tokens of each sample, and spans that are still to be added when it is packed."""
        lengths = np.array([sample.length for sample in drawn], np.int64)
        spans = np.array([sample.spans for sample in drawn], np.int64)
        return (lengths + 3 * spans, 0 * spans) if self._per_sample else (lengths, spans)

    def _plan_window(self, stage: int, first: int) -> Plan:
        settings, sequences = self.settings, self.stages[stage].sequences
        drawn = self._draw(first)
        lengths, spans = self._sizes(drawn)
        rng = _rng("window", settings.seed, first)
        if settings.packing == "whole":
            packed = pack_whole(lengths, self._size, spans, sequences, rng)
        else:
            mean = 0.0 if self._per_sample else settings.spans
            # Of a block's tokens at least a third are no control tokens: `</s> a </s>` is the least that a sample can
            # be.
            limit = cm3.span_limit(self._size // 3, self.vocabulary)
            packed = pack_blocks(lengths, self._size, np.minimum(rng.poisson(mean, sequences), limit))
        return Plan(drawn, packed, self._count(drawn, packed))

    def _count(self, drawn: list[Drawn], packed: Packed) -> dict[str, np.ndarray]:
        rows = []
        for pieces, spans in zip(packed.pieces, packed.spans, strict=True):
            begun = [drawn[piece.sample] for piece in pieces if piece.start == 0]
            tokens = sum(piece.stop - piece.start for piece in pieces) + 3 * spans
            spans = sum(sample.spans for sample in begun) if self._per_sample else spans
            retrieved = sum(len(sample.documents) - 1 for sample in begun)
            left_out = sum(sample.left_out_tokens for sample in begun), sum(sample.left_out for sample in begun)
            rows.append((tokens, self._size - tokens, 0, 0, spans, len(begun), retrieved, *left_out))
        table = np.array(rows, np.int64).T
        table[2:4, -1] = packed.cut, packed.cut_samples
        return dict(zip(COUNTERS, table, strict=True))

    # ---- reading: tokens

    def _read_sample(self, drawn: Drawn) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and answer flags of a sample, rearranged already where that is done per sample."""
        store = self.sources[drawn.source].store
        documents = [store.document(doc_id) for doc_id in drawn.documents]
        if drawn.rotated:
            documents = [rotate(document) for document in documents]
        tokens, answers = self._layout.assemble(documents)
        if len(tokens) != drawn.length:
            raise DataError(
                f"document {drawn.documents[-1]} of {self.sources[drawn.source].name} makes {len(tokens)} tokens, but "
                f"{drawn.length} by its index: the store is damaged; check it with tools/verify_data.py"
            )
        if self._per_sample:
            rng = _rng("rearrange", self.settings.seed, "sample", drawn.number)
            tokens, origin = self._rearrange(tokens, answers, drawn.spans, rng)
            answers = answers[origin]
        return tokens, answers

    def _rearrange(
        self, tokens: np.ndarray, answers: np.ndarray, count: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        bounds = cm3.segment_bounds(tokens, self._control, answers if answers.any() else None)
        spans = cm3.choose_spans(bounds, len(tokens), count, self.settings.whole_segment, rng)
        return cm3.rearrange(tokens, spans, self.vocabulary)

    def sequence(self, number: int) -> PackedSequence:
        """Sequence `number` (0 or more) of the stream. Raises DataError when a store's content is damaged."""
        stage, first, index = self.locate(number)
        plan = self._plan(stage, first)
        pieces = plan.packed.pieces[index]
        tokens = np.full(self._size, self.vocabulary.pad, np.int64)
        documents = np.full(self._size, -1, np.int32)
        answers = np.zeros(self._size, bool)
        end = 0
        for i, piece in enumerate(pieces):
            sample_tokens, sample_answers = self._sample(plan.drawn[piece.sample])
            begin, end = end, end + piece.stop - piece.start
            tokens[begin:end] = sample_tokens[piece.start : piece.stop]
            answers[begin:end] = sample_answers[piece.start : piece.stop]
            documents[begin:end] = i
        if plan.packed.spans[index] and not self._per_sample:
            rng = _rng("rearrange", self.settings.seed, "sequence", number)
            moved, origin = self._rearrange(tokens[:end], answers[:end], plan.packed.spans[index], rng)
            end = len(moved)
            # Right sides first: they read what the left sides overwrite.
            tokens[:end], documents[:end], answers[:end] = moved, documents[origin], answers[origin]
        loss_mask = np.arange(1, self._size) < end
        if self.settings.answers_only:
            loss_mask &= answers[1:]
        return PackedSequence(number, tokens, loss_mask, documents[:-1], self.samples(number))

    def samples(self, number: int) -> tuple[int, ...]:
        """Global numbers of the samples in sequence `number`; reads no tokens."""
        stage, first, index = self.locate(number)
        plan = self._plan(stage, first)
        return tuple(plan.drawn[piece.sample].number for piece in plan.packed.pieces[index])

    def counts(self, number: int) -> dict[str, int]:
        """The COUNTERS of sequence `number`; reads no tokens."""
        stage, first, index = self.locate(number)
        return {name: int(values[index]) for name, values in self._plan(stage, first).counts.items()}

    def drawn(self, number: int) -> list[Drawn]:
        """The samples in sequence `number` as they were drawn, for showing."""
        stage, first, index = self.locate(number)
        plan = self._plan(stage, first)
        return [plan.drawn[piece.sample] for piece in plan.packed.pieces[index]]

    def passes(self, number: int) -> dict[str, float]:
        """Passes over each store before the window of sequence `number`."""
        _, first, _ = self.locate(number)
        return dict(zip((source.name for source in self.sources), self.mixture.passes(first), strict=True))


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
