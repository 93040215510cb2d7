"""The CM3 rearrangement, and each defect of the published code that it must not have."""

import math

import numpy as np
import pytest

from megacm3.data import cm3
from megacm3.data.documents import IMAGE, TEXT, Document, Layout, Segment, infill_caption_prompt, unconditional_prompt
from megacm3.errors import ConfigError
from megacm3.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary.cm3leon(text_size=300, codebook_size=64, special_size=72, sentinels=64, image_tokens=16)
CONTROL = cm3.is_control(VOCABULARY)


def random_block(rng: np.random.Generator, length: int) -> np.ndarray:
    """A block of the papers' kind: pairs one after another, beginning and ending anywhere."""
    pairs = []
    for _ in range(length // 20 + 3):
        caption = rng.integers(0, 300, rng.integers(1, 9))
        picture = rng.integers(0, 64, 16)
        pairs.append(Document(0, (Segment(TEXT, caption), Segment(IMAGE, picture))))
    retrieved = rng.integers(0, 3)
    samples = [
        Layout(VOCABULARY).assemble(pairs[i : i + 1 + retrieved])[0] for i in range(0, len(pairs), 1 + retrieved)
    ]
    tokens = np.concatenate(samples)
    start = rng.integers(0, len(tokens) - length + 1)
    return tokens[start : start + length]


def draw(block: np.ndarray, count: int, whole: float, rng: np.random.Generator) -> np.ndarray:
    return cm3.choose_spans(cm3.segment_bounds(block, CONTROL), len(block), count, whole, rng)


@pytest.mark.parametrize("whole", [0.0, 0.5, 1.0])
def test_restoring_gives_back_the_block(whole: float) -> None:
    rng = np.random.default_rng(int(whole * 10))
    for _ in range(2500):
        block = random_block(rng, int(rng.integers(20, 130)))
        count = int(rng.integers(0, 5))
        spans = draw(block, count, whole, rng)
        moved, origin = cm3.rearrange(block, spans, VOCABULARY)
        # Defect 1: neither source nor tail is cut; exactly three tokens a span are added.
        assert len(moved) == len(block) + 3 * count == len(block) + 3 * len(spans)
        assert np.array_equal(cm3.restore(moved, VOCABULARY), block)
        kept = ~CONTROL[moved]
        assert np.array_equal(moved[kept], block[origin[kept]])
        assert np.array_equal(np.sort(origin[kept]), np.flatnonzero(~CONTROL[block]))


@pytest.mark.parametrize("whole", [0.0, 1.0])
def test_no_span_holds_a_boundary(whole: float) -> None:
    # Defects 4 and 5: spans over `</s></s>` between samples, spans that lie on a `<break>` alone.
    rng = np.random.default_rng(1)
    for _ in range(2500):
        block = random_block(rng, 60)
        spans = draw(block, int(rng.integers(1, 6)), whole, rng)
        for start, stop in spans:
            assert stop > start
            assert not CONTROL[block[start:stop]].any()
        assert (spans[1:, 0] >= spans[:-1, 1]).all()


def test_no_span_leaves_the_sequence_alone() -> None:
    # Defect 2: the published code crashes for n = 0 with clipping.
    block = random_block(np.random.default_rng(0), 50)
    spans = draw(block, 0, 0.5, np.random.default_rng(0))
    moved, origin = cm3.rearrange(block, spans, VOCABULARY)
    assert spans.shape == (0, 2)
    assert np.array_equal(moved, block) and np.array_equal(origin, np.arange(50))


@pytest.mark.parametrize("breaks", [0, 1])
def test_blocks_with_no_and_one_break(breaks: int) -> None:
    # Defect 3: the published code crashes here.
    block = np.arange(1, 20)
    block[5 : 5 + breaks] = VOCABULARY.break_
    bounds = cm3.segment_bounds(block, CONTROL)
    assert bounds.tolist() == ([[0, 19]] if not breaks else [[0, 5], [6, 19]])
    for seed in range(200):
        rng = np.random.default_rng(seed)
        spans = cm3.choose_spans(bounds, len(block), 2, 0.5, rng)
        assert np.array_equal(cm3.restore(cm3.rearrange(block, spans, VOCABULARY)[0], VOCABULARY), block)


def test_break_belongs_to_no_segment_and_the_end_of_a_sample_bounds() -> None:
    eos, brk = VOCABULARY.eos, VOCABULARY.break_
    block = np.array([eos, 1, 2, brk, 310, 311, eos, eos, 3, eos])
    assert cm3.segment_bounds(block, CONTROL).tolist() == [[1, 3], [4, 6], [8, 9]]
    answers = np.array([0, 0, 1, 0, 0, 0, 0, 0, 1, 0], bool)
    assert cm3.segment_bounds(block, CONTROL, answers).tolist() == [[1, 2], [2, 3], [4, 6], [8, 9]]


def test_block_of_control_tokens_only() -> None:
    block = np.array([VOCABULARY.eos, VOCABULARY.eos])
    assert draw(block, 3, 0.5, np.random.default_rng(0)).shape == (0, 2)


def test_too_few_tokens_give_fewer_spans_and_never_an_empty_one() -> None:
    block = np.array([VOCABULARY.eos, 5, VOCABULARY.break_, 6, VOCABULARY.eos])
    for seed in range(100):
        spans = draw(block, 4, 0.5, np.random.default_rng(seed))
        assert spans.tolist() == [[1, 2], [3, 4]]


def test_same_key_same_spans() -> None:
    # Defect 6: no global generator has a say.
    block = random_block(np.random.default_rng(0), 80)
    np.random.seed(1)
    first = draw(block, 3, 0.5, np.random.default_rng(7))
    np.random.seed(2)
    assert np.array_equal(first, draw(block, 3, 0.5, np.random.default_rng(7)))


def pair_block(rng: np.random.Generator, pairs: int, caption: int, picture: int) -> np.ndarray:
    documents = [
        Document(i, (Segment(TEXT, rng.integers(0, 300, caption)), Segment(IMAGE, rng.integers(0, 64, picture))))
        for i in range(pairs)
    ]
    return Layout(VOCABULARY).assemble(documents)[0]


def test_whole_captions_are_masked_at_the_configured_rate() -> None:
    # With uniform spans alone whole captions are almost never masked; half of the segments are captions, so that whole
    # segments at rate p mask a whole caption in p / 2 of the sequences with one span.
    rng = np.random.default_rng(0)
    block = pair_block(rng, pairs=4, caption=24, picture=1024)
    bounds = cm3.segment_bounds(block, CONTROL)
    captions = {tuple(bound) for bound in bounds[::2].tolist()}
    draws = 4000
    for whole, expected in ((0.5, 0.25), (0.0, 0.0)):
        hits = sum(
            tuple(cm3.choose_spans(bounds, len(block), 1, whole, rng)[0].tolist()) in captions for _ in range(draws)
        )
        assert abs(hits / draws - expected) < 4 * math.sqrt(0.25 * 0.75 / draws) if expected else hits / draws < 0.005


def test_whole_segments_are_distinct_and_uniform() -> None:
    bounds = np.array([[1, 3], [4, 9], [10, 11], [12, 20]])
    rng = np.random.default_rng(0)
    seen = np.zeros(4, int)
    for _ in range(2500):
        spans = cm3.choose_spans(bounds, 21, 2, 1.0, rng)
        index = [bounds.tolist().index(span) for span in spans.tolist()]
        assert len(set(index)) == 2 and index == sorted(index)
        seen[index] += 1
    assert abs(seen / 5000 - 0.25).max() < 0.02


def test_as_many_whole_segments_as_there_are_is_left_to_uniform_spans() -> None:
    # n > 1 takes whole segments only when n is less than their number.
    bounds = np.array([[0, 50], [51, 100]])
    rng = np.random.default_rng(0)
    drawn = [cm3.choose_spans(bounds, 100, 2, 1.0, rng).tolist() for _ in range(200)]
    assert sum(spans == bounds.tolist() for spans in drawn) < 20


def test_uniform_spans_are_clipped_to_the_segment_they_overlap_most() -> None:
    class Fixed:
        def random(self) -> float:
            return 1.0

        def integers(self, low: int, high: int, size: int) -> np.ndarray:
            return np.array([90, 5])

    spans = cm3.choose_spans(np.array([[1, 20], [21, 80], [81, 100]]), 101, 1, 0.5, Fixed())  # type: ignore[arg-type]
    assert spans.tolist() == [[21, 80]]


def test_prompts_are_beginnings_of_training_sequences() -> None:
    rng = np.random.default_rng(3)
    caption, codes = rng.integers(0, 300, 5), rng.integers(0, 64, 16)
    retrieved = [Document(1, (Segment(TEXT, rng.integers(0, 300, 4)), Segment(IMAGE, rng.integers(0, 64, 16))))]
    own = Document(0, (Segment(TEXT, caption), Segment(IMAGE, codes)))
    for documents in ([], retrieved):
        block, _ = Layout(VOCABULARY).assemble([*documents, own])
        bounds = cm3.segment_bounds(block, CONTROL)
        moved, _ = cm3.rearrange(block, bounds[-2:-1], VOCABULARY)
        prompt = infill_caption_prompt(VOCABULARY, codes, documents)
        assert np.array_equal(moved, [*prompt, *caption, VOCABULARY.eoss])
        unconditional = unconditional_prompt(VOCABULARY, documents)
        assert np.array_equal(moved[: len(unconditional)], unconditional)
    mask = VOCABULARY.sentinel(0)
    assert unconditional_prompt(VOCABULARY).tolist() == [VOCABULARY.eos, mask, VOCABULARY.break_]
    plain = infill_caption_prompt(VOCABULARY, codes).tolist()
    ids = VOCABULARY.image_ids(codes).tolist()
    assert plain == [VOCABULARY.eos, mask, VOCABULARY.break_, *ids, VOCABULARY.eos, mask]


def test_infill_prompt_needs_a_span() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        cm3.infill_prompt(np.arange(4), np.zeros((0, 2), np.int64), VOCABULARY)


def test_restore_ignores_padding_and_refuses_a_torn_sequence() -> None:
    block = random_block(np.random.default_rng(0), 40)
    moved, _ = cm3.rearrange(block, draw(block, 2, 0.0, np.random.default_rng(0)), VOCABULARY)
    padded = np.concatenate([moved, np.full(7, VOCABULARY.pad)])
    assert np.array_equal(cm3.restore(padded, VOCABULARY), block)
    with pytest.raises(ConfigError, match="not one rearranged sequence"):
        cm3.restore(moved[:-1], VOCABULARY)
