"""The stream: nothing lost, nothing cut that must not be, the same sequence whatever was read before."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from megacm3.data import cm3
from megacm3.data.documents import IMAGE, TEXT, Layout, Segment, rotate, unconditional_prompt
from megacm3.data.mixture import Mixture, Stage
from megacm3.data.stream import PackedSequence, Stream
from megacm3.data.synthetic import MemoryStore, RandomNeighbours
from megacm3.data.windows import COUNTERS, Source, StreamSettings, add_counts, default_window
from megacm3.errors import DataError
from megacm3.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary.cm3leon(text_size=300, codebook_size=64, special_size=72, sentinels=64, image_tokens=16)


def pairs(count: int, longest: int = 9, seed: int = 0) -> MemoryStore:
    rng = np.random.default_rng(seed)
    return MemoryStore(
        [
            (Segment(TEXT, rng.integers(0, 300, rng.integers(1, longest))), Segment(IMAGE, rng.integers(0, 64, 16)))
            for _ in range(count)
        ]
    )


def stream(store: MemoryStore, retrieved: int = 0, window: int = 0, **settings: object) -> Stream:
    sampler = RandomNeighbours(len(store), retrieved) if retrieved else None
    values = {"sequence_length": 120, "packing": "whole"} | settings
    mixture = Mixture([len(store)], [Stage(0, (1.0,))], seed=0)
    return Stream([Source("store", store, sampler)], mixture, VOCABULARY, StreamSettings(**values), window)  # type: ignore[arg-type]


def assembled(source: Stream, sequence: PackedSequence) -> list[np.ndarray]:
    """The samples of a sequence, made anew from their documents."""
    made = []
    for drawn in source.drawn(sequence.number):
        documents = [source.sources[drawn.source].store.document(doc_id) for doc_id in drawn.documents]
        documents = [rotate(document) for document in documents] if drawn.rotated else documents
        made.append(Layout(VOCABULARY, source.settings.turns).assemble(documents)[0])
    return made


def real(sequence: PackedSequence) -> np.ndarray:
    """Its tokens without padding, which must all stand at the end."""
    is_pad = sequence.tokens == VOCABULARY.pad
    length = int((~is_pad).sum())
    assert not is_pad[:length].any()
    return sequence.tokens[:length]


def window_of(source: Stream, number: int = 0) -> range:
    size = source.stages[0].sequences
    return range(number * size, (number + 1) * size)


SHAPES = [
    {"packing": "whole"},
    {"packing": "whole", "spans": 0.0},
    {"packing": "whole", "spans": 3.0, "rotation": 0.5},
    {"packing": "whole", "document_mask": True, "spans": 2.0},
    {"packing": "blocks"},
    {"packing": "blocks", "spans": 0.0},
    {"packing": "blocks", "document_mask": True, "rotation": 0.5},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("retrieved", [0, 2])
def test_sequences_are_a_function_of_their_number(shape: dict[str, object], retrieved: int) -> None:
    store = pairs(300)
    first, second = stream(store, retrieved, **shape), stream(store, retrieved, **shape)
    assert first.fingerprint == second.fingerprint
    forward = {n: first.sequence(n) for n in range(150)}
    for n in [149, 7, 100, 0, 8]:
        again = second.sequence(n)
        for name in ("tokens", "loss_mask", "documents"):
            assert np.array_equal(getattr(again, name), getattr(forward[n], name)), (n, name)
        assert again.samples == forward[n].samples == second.samples(n)
    # Far away, without what comes before.
    assert len(first.sequence(10**9).tokens) == 121


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("retrieved", [0, 2])
def test_nothing_is_lost_and_the_counts_are_right(shape: dict[str, object], retrieved: int) -> None:
    source = stream(pairs(300), retrieved, **shape)
    whole, per_sample = shape["packing"] == "whole", bool(shape.get("document_mask")) and shape.get("spans", 1.0) != 0
    flat: list[np.ndarray] = []
    samples: list[np.ndarray] = []
    moved: list[int] = []
    seen: set[int] = set()
    for n in window_of(source, 1):
        sequence, counts = source.sequence(n), source.counts(n)
        tokens = real(sequence)
        assert counts["tokens"] == len(tokens) and counts["padding"] == 121 - len(tokens)
        assert sequence.loss_mask.sum() == max(0, len(tokens) - 1) and sequence.loss_mask[: len(tokens) - 1].all()
        assert (sequence.documents[: len(tokens)] >= 0).all() and (sequence.documents[len(tokens) :] == -1).all()
        if whole:
            made = assembled(source, sequence)
            assert VOCABULARY.is_image(tokens).sum() % 16 == 0
            if per_sample:
                index = np.append(sequence.documents, sequence.documents[-1])[: len(tokens)]
                restored = [cm3.restore(tokens[index == i], VOCABULARY) for i in range(len(made))]
            else:
                restored = [cm3.restore(tokens, VOCABULARY)]
                made = [np.concatenate(made)]
            assert all(np.array_equal(a, b) for a, b in zip(restored, made, strict=True))
        else:
            flat.append(tokens if per_sample else cm3.restore(tokens, VOCABULARY))
            for number, sample in zip(sequence.samples, assembled(source, sequence), strict=True):
                if number not in seen:
                    seen.add(number)
                    samples.append(sample)
                    spans = next(drawn.spans for drawn in source.drawn(n) if drawn.number == number)
                    moved.append(len(sample) + 3 * spans)
    if flat and per_sample:
        # Cut after the rearrangement, so that each sample comes back from its pieces; the last may end in the surplus.
        runs = np.split(np.concatenate(flat), np.cumsum(moved))[: len(moved) - 1]
        assert all(np.array_equal(cm3.restore(run, VOCABULARY), s) for run, s in zip(runs, samples, strict=False))
    elif flat:
        assert np.array_equal(np.concatenate(flat), np.concatenate(samples)[: sum(map(len, flat))])
    total = add_counts(source.counts(n) for n in window_of(source, 1))
    assert set(total) == set(COUNTERS)
    assert total["samples"] + total["cut_samples"] >= source.window
    share = total["padding"] / (total["padding"] + total["tokens"])
    # Three pairs of about 25 tokens fill little more than half of a sequence, and a second sample has no room.
    assert share < ((0.45 if retrieved else 0.25) if whole else 0.02)


def spans_of(tokens: np.ndarray) -> int:
    return int((tokens == VOCABULARY.eoss).sum())


@pytest.mark.parametrize("packing", ["blocks", "whole"])
def test_number_of_spans_is_poisson(packing: str) -> None:
    source = stream(pairs(2000), packing=packing)
    draws = 3000
    counts = np.bincount([spans_of(source.sequence(n).tokens) for n in range(draws)], minlength=6)
    expected = np.array([math.exp(-1) / math.factorial(n) for n in range(5)]) * draws
    assert ((counts[:5] - expected) ** 2 / expected).sum() < 5 + 5 * math.sqrt(10)
    # And what the plan says.
    assert sum(n * c for n, c in enumerate(counts)) == sum(source.counts(n)["spans"] for n in range(draws))


def test_number_of_spans_does_not_depend_on_the_fit() -> None:
    # Samples that nearly fill a sequence must be rearranged as often as others.
    source = stream(pairs(500, longest=3), retrieved=5, sequence_length=128)
    counts = [spans_of(source.sequence(n).tokens) for n in range(1500)]
    assert abs(np.mean(counts) - 1.0) < 0.12


def test_whole_captions_are_masked_and_the_unconditional_prompt_occurs() -> None:
    # Zero retrieved documents, one sample a sequence: half of one-span sequences mask a whole segment, half of these
    # the caption; then the sequence begins as the unconditional prompt does.
    source = stream(pairs(2000, longest=30), sequence_length=52, whole_segment=0.5)
    single = [source.sequence(n) for n in range(2500)]
    single = [sequence for sequence in single if spans_of(sequence.tokens) == 1 and len(sequence.samples) == 1]
    prompt = unconditional_prompt(VOCABULARY)
    share = np.mean([np.array_equal(sequence.tokens[: len(prompt)], prompt) for sequence in single])
    assert len(single) > 500 and 0.2 < share < 0.4
    never = stream(pairs(2000, longest=30), sequence_length=52, spans=0.0)
    assert all(spans_of(never.sequence(n).tokens) == 0 for n in range(200))


def test_spans_fall_in_retrieved_documents_too() -> None:
    source = stream(pairs(500), retrieved=3, sequence_length=150)
    before = 0
    for n in range(300):
        tokens = real(source.sequence(n))
        marks = np.flatnonzero((tokens >= VOCABULARY.sentinel(0)) & (tokens < VOCABULARY.sentinel(63)))
        before += bool(len(marks)) and VOCABULARY.is_image(tokens[: marks[0]]).sum() < 16
    assert before > 30


def test_retrieved_documents_that_do_not_fit_are_left_out_and_counted() -> None:
    source = stream(pairs(300), retrieved=3, sequence_length=60)
    total = add_counts(source.counts(n) for n in window_of(source))
    assert total["left_out_documents"] > 0 and total["left_out"] > 16 * total["left_out_documents"]
    assert total["retrieved"] + total["left_out_documents"] == 3 * total["samples"]
    for n in list(window_of(source))[:100]:
        for drawn in source.drawn(n):
            assert drawn.length + 3 * drawn.spans <= 61 and len(drawn.documents) == 4 - drawn.left_out


class InOrder:
    def sample(self, doc_id: int, rng: np.random.Generator) -> Sequence[int]:
        return [0, 1, 2]


def test_a_document_that_does_not_fit_is_refused() -> None:
    long, short = Segment(TEXT, np.zeros(60, int)), Segment(TEXT, np.zeros(5, int))
    store = MemoryStore([(short,), (long,), (short,), (short,)])
    mixture = Mixture([4], [Stage(0, (1.0,))], seed=0)
    settings = StreamSettings(40, packing="whole", spans=0.0)
    with pytest.raises(DataError, match=r"document 1 of store makes 62 tokens; a sequence holds 41"):
        Stream([Source("store", store, InOrder())], mixture, VOCABULARY, settings)


def test_long_retrieved_document_is_skipped_and_the_others_stay() -> None:
    long, short = Segment(TEXT, np.zeros(60, int)), Segment(TEXT, np.zeros(5, int))
    store = MemoryStore([(short,), (long,), (short,), (short,)])
    settings = StreamSettings(40, packing="whole", spans=0.0)

    class Short(Mixture):
        def lookup(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            stores, documents, epochs = super().lookup(first, count)
            return stores, np.full_like(documents, 3), epochs

    mixture = Short([4], [Stage(0, (1.0,))], seed=0)
    source = Stream([Source("store", store, InOrder())], mixture, VOCABULARY, settings)
    assert all(drawn.documents == (0, 2, 3) and drawn.left_out == 1 for drawn in source.drawn(0))


def test_spans_without_room_are_counted() -> None:
    # A pair of 24 tokens in sequences of 26: no room for three more tokens a span.
    rng = np.random.default_rng(0)
    store = MemoryStore([(Segment(TEXT, rng.integers(0, 300, 5)), Segment(IMAGE, rng.integers(0, 64, 16)))] * 50)
    tight = stream(store, sequence_length=25)
    total = add_counts(tight.counts(n) for n in window_of(tight))
    assert total["spans"] == 0 and 0.7 < total["unplaced_spans"] / total["samples"] < 1.3
    wide = stream(store, sequence_length=60)
    assert add_counts(wide.counts(n) for n in window_of(wide))["unplaced_spans"] == 0


def test_document_mask_keeps_samples_apart() -> None:
    source = stream(pairs(300), packing="whole", document_mask=True, spans=2.0)
    moved = 0
    for n in range(100):
        sequence = source.sequence(n)
        index = np.append(sequence.documents, sequence.documents[-1])[: len(real(sequence))]
        assert (np.diff(index) >= 0).all() and (np.diff(index) <= 1).all()
        runs = [real(sequence)[index == i] for i in range(len(sequence.samples))]
        assert all(run[0] == VOCABULARY.eos for run in runs)
        moved += sum(spans_of(run) for run in runs)
    assert moved > 100


def test_rotation() -> None:
    source = stream(pairs(1000), rotation=0.5, spans=0.0, sequence_length=60)
    first = [source.sequence(n).tokens[1] for n in range(600)]
    assert 0.4 < VOCABULARY.is_image(np.array(first)).mean() < 0.6
    assert not VOCABULARY.is_image(np.array([stream(pairs(50)).sequence(n).tokens[1] for n in range(9)])).any()


def test_loss_on_answers_only() -> None:
    rng = np.random.default_rng(0)
    store = MemoryStore(
        [
            (
                Segment(IMAGE, rng.integers(0, 64, 16)),
                Segment(TEXT, np.array([7, 8])),
                Segment(TEXT, np.array([9, 9]), True),
            )
            for _ in range(100)
        ]
    )
    source = stream(store, answers_only=True, turns=True, spans=0.0)
    for n in range(20):
        sequence = source.sequence(n)
        targets = sequence.tokens[1:][sequence.loss_mask]
        assert targets.tolist() == [9, 9, VOCABULARY.eos] * len(sequence.samples)


def test_stages_have_windows_of_their_own() -> None:
    short, long = pairs(400, longest=3), pairs(400, longest=60, seed=1)
    sources = [Source("short", short), Source("long", long)]
    stages = [Stage(0, (1.0, 0.0)), Stage(5 * 128, (0.5, 0.5))]
    settings = StreamSettings(120, packing="whole")
    source = Stream(sources, Mixture([400, 400], stages, seed=0), VOCABULARY, settings, window=128)
    boundary = source.stages[1].first_sequence
    assert boundary == 5 * source.stages[0].sequences
    assert source.stages[1].sequences > source.stages[0].sequences
    used = [{drawn.source for drawn in source.drawn(n)} for n in range(boundary + 20)]
    assert set.union(*used[:boundary]) == {0} and set.union(*used[boundary:]) == {0, 1}
    assert source.passes(boundary) == {"short": 5 * 128 / 400, "long": 0.0}
    numbers = [number for n in range(boundary + 20) for number in source.samples(n)]
    assert len(numbers) == len(set(numbers))


def test_starting_and_jumping_reads_few_documents() -> None:
    # Whatever the size of the store: planning a window reads its lengths, a sequence its own documents.
    class Counting(MemoryStore):
        lengths = documents = 0

        def __len__(self) -> int:
            return 10**9

        def segment_lengths(self, doc_id: int) -> list[tuple[int, int]]:
            Counting.lengths += 1
            return super().segment_lengths(doc_id % 100)

        def document(self, doc_id: int):  # type: ignore[no-untyped-def]
            Counting.documents += 1
            return super().document(doc_id % 100)

    rng = np.random.default_rng(0)
    store = Counting(
        [(Segment(TEXT, rng.integers(0, 300, 5)), Segment(IMAGE, rng.integers(0, 64, 16))) for _ in range(100)]
    )
    source = stream(store)
    assert Counting.lengths <= 4 * 1024 and Counting.documents == 0
    source.sequence(10**9 + 17)
    assert Counting.lengths <= 5 * 1024 and Counting.documents <= 6


def test_a_store_whose_index_lies_is_refused() -> None:
    class Lying(MemoryStore):
        def segment_lengths(self, doc_id: int) -> list[tuple[int, int]]:
            return [(TEXT, 3), (IMAGE, 16)]

    store = Lying([(Segment(TEXT, np.zeros(5, int)), Segment(IMAGE, np.zeros(16, int)))] * 10)
    with pytest.raises(DataError, match=r"makes 24 tokens, but 22 by its index.*verify_data"):
        stream(store).sequence(0)


def test_default_window() -> None:
    assert default_window(10**8) == 1024
    assert default_window(503) == 503
    assert default_window(7) == 7 * 37
