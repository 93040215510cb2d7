"""The global stream of packed sequences: a pure function of (settings, stores, position).

Sequence n lies in window n // sequences; a window takes a fixed number of samples of the mixture and fills a fixed
number of sequences from them (packing.py). So any position is reached by planning one window, which reads lengths and
neighbour lists but no token; and every random number is keyed by the number of a sample, a sequence or a window.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from megacm3.data import cm3
from megacm3.data.documents import Layout, rotate
from megacm3.data.mixture import Mixture
from megacm3.data.windows import Drawn, Plan, Source, StreamSettings, Windows, default_window, keyed
from megacm3.errors import DataError
from megacm3.files import sha256_json
from megacm3.tokenizers.vocabulary import Vocabulary

VERSION = 1
"""Of the stream's definition: raised whenever the same settings would give other sequences."""


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
    answers: np.ndarray
    """bool [L + 1]: tokens of answers (fine-tuning), whatever bears loss."""


@dataclass(frozen=True)
class WindowStage:
    """A stretch of the stream with windows of one shape."""

    first_sequence: int
    first_sample: int
    documents: int
    """Samples of a window."""
    sequences: int
    """Sequences of a window."""


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
        self._windows = Windows(self.sources, mixture, self._layout, settings, self.window)
        self._control = cm3.is_control(vocabulary)
        self._sample = lru_cache(maxsize=2)(self._read_sample)
        self.stages = self._stages()

    def _stages(self) -> tuple[WindowStage, ...]:
        stages: list[WindowStage] = []
        for stage in self.mixture.stages:
            assert stage.first % self.window == 0, (stage.first, self.window)
            windows = (stage.first - stages[-1].first_sample) // self.window if stages else 0
            first = stages[-1].first_sequence + windows * stages[-1].sequences if stages else 0
            stages.append(WindowStage(first, stage.first, self.window, self._windows.sequences(stage.first)))
        return tuple(stages)

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

    def locate(self, number: int) -> tuple[WindowStage, int, int]:
        """(stage, first sample of the window, index in the window) of sequence `number`."""
        assert number >= 0
        stage = next(stage for stage in reversed(self.stages) if stage.first_sequence <= number)
        window, index = divmod(number - stage.first_sequence, stage.sequences)
        return stage, stage.first_sample + window * stage.documents, index

    def _plan(self, number: int) -> tuple[Plan, int]:
        stage, first, index = self.locate(number)
        return self._windows.plan(first, stage.sequences), index

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
        if self._windows.per_sample:
            rng = keyed("rearrange", self.settings.seed, "sample", drawn.number)
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
        plan, index = self._plan(number)
        pieces = plan.packed.pieces[index]
        size = self._windows.size
        tokens = np.full(size, self.vocabulary.pad, np.int64)
        documents = np.full(size, -1, np.int32)
        answers = np.zeros(size, bool)
        end = 0
        for i, piece in enumerate(pieces):
            sample_tokens, sample_answers = self._sample(plan.drawn[piece.sample])
            begin, end = end, end + piece.stop - piece.start
            tokens[begin:end] = sample_tokens[piece.start : piece.stop]
            answers[begin:end] = sample_answers[piece.start : piece.stop]
            documents[begin:end] = i
        if plan.packed.spans[index] and not self._windows.per_sample:
            rng = keyed("rearrange", self.settings.seed, "sequence", number)
            moved, origin = self._rearrange(tokens[:end], answers[:end], plan.packed.spans[index], rng)
            end = len(moved)
            # Right sides first: they read what the left sides overwrite.
            tokens[:end], documents[:end], answers[:end] = moved, documents[origin], answers[origin]
        loss_mask = np.arange(1, size) < end
        if self.settings.answers_only:
            loss_mask &= answers[1:]
        return PackedSequence(number, tokens, loss_mask, documents[:-1], self.samples(number), answers)

    def samples(self, number: int) -> tuple[int, ...]:
        """Global numbers of the samples in sequence `number`; reads no tokens."""
        plan, index = self._plan(number)
        return tuple(plan.drawn[piece.sample].number for piece in plan.packed.pieces[index])

    def counts(self, number: int) -> dict[str, int]:
        """The COUNTERS of sequence `number`; reads no tokens."""
        plan, index = self._plan(number)
        return {name: int(values[index]) for name, values in plan.counts.items()}

    def drawn(self, number: int) -> list[Drawn]:
        """The samples in sequence `number` as they were drawn, for showing."""
        plan, index = self._plan(number)
        return [plan.drawn[piece.sample] for piece in plan.packed.pieces[index]]

    def passes(self, number: int) -> dict[str, float]:
        """Passes over each store before the window of sequence `number`."""
        _, first, _ = self.locate(number)
        return dict(zip((source.name for source in self.sources), self.mixture.passes(first), strict=True))
