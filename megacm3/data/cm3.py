"""The causal-masked (CM3) rearrangement: some spans move to the end of the sequence, behind numbered sentinels.

    </s> a cat B I I I </s>   ->   </s> <sentinel:0> B I I I </s>   <sentinel:0> a cat <eoss>
                                   `------- source ---------'       `--------- tail --------'

n ~ Poisson(mean) spans add 3n tokens. Room for them is planned before (packing.py), so that no token of source or tail
is ever cut off. Spans lie inside segments: the runs between control tokens (`</s>`, `<break>`, padding, ...), so that
none crosses `<break>` or the end of a document. Sources: CM3Leon 2.2, CM3 (arXiv:2201.07520); where the published code
has defects, the tests in tests/unit/data/test_cm3.py say which.
"""

import numpy as np

from megacm3.errors import ConfigError
from megacm3.tokenizers.vocabulary import IMAGE, TEXT, Vocabulary

_ROUNDS = 16
"""Draws of uniform spans before giving up: one is thrown away when a span holds control tokens only."""


def is_control(vocabulary: Vocabulary) -> np.ndarray:
    """bool [size]: ids that bound segments, which is every id that is neither text nor an image code."""
    return (vocabulary.kind != TEXT) & (vocabulary.kind != IMAGE)


def segment_bounds(tokens: np.ndarray, control: np.ndarray, answers: np.ndarray | None = None) -> np.ndarray:
    """int64 [segments, 2]: half-open runs of `tokens` [n] without control ids; may be empty.

    control: `is_control(vocabulary)`. answers: bool [n]; a segment also ends where it changes (fine-tuning).
    """
    label = (~control[tokens]).astype(np.int8)
    if answers is not None:
        label += label * answers
    edges = np.flatnonzero(np.diff(label, prepend=0, append=0))
    if answers is None:
        return edges.reshape(-1, 2)
    starts, ends = edges[:-1], edges[1:]
    return np.stack([starts, ends], 1)[label[starts] > 0]


def span_limit(content: int, vocabulary: Vocabulary) -> int:
    """Most spans of a sequence with `content` tokens inside segments: one for every two of them, or the sentinels."""
    return min(vocabulary.sentinels, (content + 1) // 2)


def choose_spans(bounds: np.ndarray, length: int, count: int, whole: float, rng: np.random.Generator) -> np.ndarray:
    """int64 [count, 2]: `count` disjoint non-empty spans in order, each inside one segment of `bounds`.

    With probability `whole` the spans are distinct whole segments (when count is 1 or less than the number of
    segments); else `count` disjoint uniform spans of the `length` tokens, each clipped to the segment that it overlaps
    most. Returns fewer spans only where there are fewer tokens in segments than `count`.
    """
    if count == 0 or len(bounds) == 0:
        return np.zeros((0, 2), np.int64)
    take_whole = rng.random() < whole
    if take_whole and (count == 1 or count < len(bounds)):
        return bounds[np.sort(rng.choice(len(bounds), count, replace=False))]
    for _ in range(_ROUNDS):
        # The sorted ends of `count` uniform intervals, given that these are disjoint, are 2 x count sorted uniforms.
        starts, ends = np.sort(rng.integers(0, length + 1, 2 * count)).reshape(-1, 2).T
        low = np.maximum(starts[:, None], bounds[:, 0])
        high = np.minimum(ends[:, None], bounds[:, 1])
        best = np.argmax(high - low, axis=1)
        row = np.arange(count)
        if ((high - low)[row, best] > 0).all():
            return np.stack([low[row, best], high[row, best]], 1)
    content = np.concatenate([np.arange(start, end) for start, end in bounds])
    single = np.sort(rng.choice(content, min(count, len(content)), replace=False))
    return np.stack([single, single + 1], 1)


def rearrange(tokens: np.ndarray, spans: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Move `spans` [count, 2] (disjoint, in order) of `tokens` [n] behind sentinels to the end.

    Returns (tokens int64 [n + 3 count], origin int64 [n + 3 count]): origin is the position in the argument that each
    token comes from, for sentinels and `<eoss>` the first position of their span; it carries along whatever else is
    known of each token.
    """
    if len(spans) == 0:
        return tokens, np.arange(len(tokens))
    place = np.arange(len(tokens))
    source, tail, source_origin, tail_origin = [], [], [], []
    end = 0
    for i, (start, stop) in enumerate(spans.tolist()):
        sentinel, first = np.array([vocabulary.sentinel(i)]), place[start : start + 1]
        source += [tokens[end:start], sentinel]
        source_origin += [place[end:start], first]
        tail += [sentinel, tokens[start:stop], np.array([vocabulary.eoss])]
        tail_origin += [first, place[start:stop], first]
        end = stop
    moved = np.concatenate([*source, tokens[end:], *tail], dtype=np.int64)
    return moved, np.concatenate([*source_origin, place[end:], *tail_origin])


def infill_prompt(tokens: np.ndarray, spans: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """int64: the beginning of the rearranged sequence up to the first sentinel of its tail, after which span 0 follows.

    The contents of the spans do not matter (they are what shall be found). Raises ConfigError without a span.
    """
    if len(spans) == 0:
        raise ConfigError("an infill prompt needs at least one masked span; found none")
    moved, _ = rearrange(tokens, spans, vocabulary)
    source = len(tokens) - int((spans[:, 1] - spans[:, 0]).sum()) + len(spans)
    return moved[: source + 1]


def split_tail(tokens: np.ndarray, vocabulary: Vocabulary) -> tuple[np.ndarray, list[np.ndarray]]:
    """The source with its sentinels in place, and what each of them stands for; padding at the end is removed.

    Raises ConfigError when sentinels and tail do not match.
    """
    tokens = tokens[: len(tokens) - int(np.argmax(np.append(tokens[::-1] != vocabulary.pad, True)))]
    first = vocabulary.sentinel(0) if vocabulary.sentinels else vocabulary.size
    marks = np.flatnonzero((tokens >= first) & (tokens < first + vocabulary.sentinels))
    if len(marks) == 0:
        return tokens, []
    count, numbers = len(marks) // 2, tokens[marks] - first
    ends = np.flatnonzero(tokens == vocabulary.eoss)
    if len(marks) % 2 or not np.array_equal(numbers, np.tile(np.arange(count), 2)) or len(ends) != count:
        raise ConfigError(f"not one rearranged sequence: sentinels {numbers.tolist()}, {len(ends)} ends of spans")
    spans = [tokens[begin + 1 : end] for begin, end in zip(marks[count:], ends, strict=True)]
    return tokens[: marks[count]], spans


def restore(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """The sequence before `rearrange`: padding at the end removed, every span back in its place.

    Raises ConfigError when sentinels and tail do not match.
    """
    source, spans = split_tail(tokens, vocabulary)
    if not spans:
        return source
    first = vocabulary.sentinel(0)
    marks = np.flatnonzero((source >= first) & (source < first + vocabulary.sentinels))
    parts = [piece[1:] if i else piece for i, piece in enumerate(np.split(source, marks))]
    between = [array for pair in zip(parts, spans, strict=False) for array in pair]
    return np.concatenate([*between, parts[-1]])
