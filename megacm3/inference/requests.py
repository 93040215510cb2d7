"""From texts and pictures to the prompts of a request's streams. Layouts are those of training (data/documents.py)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megacm3.data.cm3 import infill_prompt
from megacm3.data.documents import IMAGE, TEXT, Document, Layout, Segment, unconditional_prompt
from megacm3.data.images import Reject
from megacm3.data.sources import clean_text
from megacm3.errors import ConfigError, DataError
from megacm3.inference.engine import Guides, no_guides
from megacm3.inference.guidance import Guidance
from megacm3.tokenizers.text import TextTokenizer
from megacm3.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class Mask:
    """The part that an infill request asks for."""

    kind: str = "text"
    """text or image"""


def text_segment(text: str, tokenizer: TextTokenizer, *, strip: bool = True) -> Segment:
    """The ids of a user's text, cleaned as captions are; names of special tokens in it stay plain text.

    `strip` false keeps spaces at the ends, for a text that goes on. Raises DataError for a text that is empty or no
    Unicode.
    """
    try:
        cleaned = clean_text(text)
    except Reject as fault:
        raise DataError(f"the prompt {text[:60]!r} cannot be used: {fault}; expected text") from fault
    if not strip:
        head, tail = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
        cleaned = " " * head + cleaned + " " * tail
    return Segment(TEXT, np.asarray(tokenizer.encode(cleaned), np.int64))


def image_segment(codes: np.ndarray) -> Segment:
    """A picture's codes [n]."""
    return Segment(IMAGE, np.asarray(codes, np.int64))


def picture_prompt(
    vocabulary: Vocabulary, segments: Sequence[Segment], retrieved: Sequence[Document], turn: bool = False
) -> list[int]:
    """Ids `</s> documents segments <break>`, after which codes follow; `turn`: `<end-of-turn>` before the `<break>`."""
    opened = open_prompt(vocabulary, segments, retrieved)
    if turn and segments:
        closed = opened[:-1] if segments[-1].kind == IMAGE and vocabulary.family != "chameleon" else opened
        return [*closed, vocabulary.end_of_turn, vocabulary.boi]
    # cm3leon has one <break> at a change: behind a picture or a retrieved document it is there already.
    joined = vocabulary.family != "chameleon" and (not segments or segments[-1].kind == IMAGE)
    return opened if joined else [*opened, vocabulary.boi]


def open_prompt(vocabulary: Vocabulary, segments: Sequence[Segment], retrieved: Sequence[Document]) -> list[int]:
    """Ids `</s> documents segments`, the sample left open; a last picture is closed (cm3leon: by `<break>`)."""
    layout = Layout(vocabulary)
    if not segments:
        return layout.prefix(retrieved).tolist()
    tokens, _ = layout.assemble([*retrieved, Document(-1, tuple(segments))])
    ids = tokens[:-1].tolist()
    if vocabulary.family != "chameleon" and segments[-1].kind == IMAGE:
        ids.append(vocabulary.break_)
    return ids


def guides_for(
    vocabulary: Vocabulary, guidance: Guidance, segments: Sequence[Segment], retrieved: Sequence[Document]
) -> Guides:
    """The other streams of a picture: (images without the text, if three are wanted,) and neither; documents stay."""
    if guidance.streams == 1:
        return no_guides
    streams = [unconditional_prompt(vocabulary, retrieved).tolist()]
    if guidance.streams == 3:
        streams.insert(0, picture_prompt(vocabulary, _without_text(vocabulary, segments), retrieved))
    return lambda before: streams


def _without_text(vocabulary: Vocabulary, segments: Sequence[Segment]) -> list[Segment]:
    """Every text replaced by its sentinel, a pattern that training makes; Chameleon has none and leaves it away."""
    if not vocabulary.sentinels:
        return [segment for segment in segments if segment.kind == IMAGE]
    kept, masked = [], 0
    for segment in segments:
        if segment.kind == TEXT:
            kept.append(Segment(TEXT, np.array([vocabulary.sentinel(masked)])))
            masked += 1
        else:
            kept.append(segment)
    return kept


def running_guides(vocabulary: Vocabulary, guidance: Guidance, retrieved: Sequence[Document]) -> Guides:
    """Streams for a picture begun in the middle of an interleaved sample."""
    if guidance.streams == 1:
        return no_guides
    nothing = unconditional_prompt(vocabulary, retrieved).tolist()

    def streams(before: Sequence[int]) -> list[list[int]]:
        if guidance.streams == 2:
            return [nothing]
        ids = np.asarray(before, np.int64)
        marks = np.isin(ids, [vocabulary.bos, vocabulary.boi, vocabulary.eoi])
        return [ids[vocabulary.is_image(ids) | marks].tolist(), nothing]

    return streams


def infill(
    vocabulary: Vocabulary, parts: Sequence[Segment | Mask], retrieved: Sequence[Document]
) -> tuple[list[int], Mask]:
    """The CM3 prompt for the one Mask among `parts`: `</s> ... <sentinel:0> ... </s> <sentinel:0>`.

    Raises ConfigError when there is not exactly one Mask, or the vocabulary has no sentinels.
    """
    masks = [part for part in parts if isinstance(part, Mask)]
    if len(masks) != 1 or masks[0].kind not in ("text", "image"):
        raise ConfigError(f"infill found {len(masks)} masks; expected one Mask('text') or Mask('image')")
    if not vocabulary.sentinels:
        raise ConfigError(f"a vocabulary of family '{vocabulary.family}' has no sentinels; nothing can be infilled")
    # The masked content may be anything: two fillings differ exactly where it stands.
    first, second = (_filled(vocabulary, parts, retrieved, code) for code in (0, 1))
    places = np.flatnonzero(first != second)
    span = np.array([[places[0], places[-1] + 1]])
    return infill_prompt(first, span, vocabulary).tolist(), masks[0]


def _filled(
    vocabulary: Vocabulary, parts: Sequence[Segment | Mask], retrieved: Sequence[Document], code: int
) -> np.ndarray:
    segments = []
    for part in parts:
        if isinstance(part, Segment):
            segments.append(part)
        elif part.kind == "image":
            segments.append(Segment(IMAGE, np.full(vocabulary.image_tokens, code)))
        else:
            segments.append(Segment(TEXT, np.array([code])))
    return Layout(vocabulary).assemble([*retrieved, Document(-1, tuple(segments))])[0]
