"""Documents as typed segments, and how they become one sample of token ids.

Layouts (T text ids, I the codes of one picture, B `<break>`); sources: CM3Leon's figure 9 and 2.1, with `</s>` at both
ends as its released data code has it; Chameleon's released ids and its fine-tuning section:

    cm3leon     </s> (T B I B) x K  T B I </s>      one B between text and picture, two pictures, and two documents;
                                                    nothing between two texts of one document
    chameleon   <s> T BOI I EOI ... </s>            every picture in its own pair of marks
    turns       prompt <end-of-turn> answer         fine-tuning: where answers begin and end (Chameleon; optional else)

Retrieved documents stand in front of the sample's own document, in the order given.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megacm3.data import cm3
from megacm3.errors import ConfigError
from megacm3.tokenizers.vocabulary import Vocabulary

TEXT, IMAGE = 0, 1
"""Kinds of a segment."""
ANSWER = 2
"""Bit of a store's mode beside the kind: the segment is part of an answer (fine-tuning)."""

Shape = tuple[tuple[int, int], ...]
"""A document without its tokens: (mode, number of tokens) of each segment; mode = kind + ANSWER where it applies."""


@dataclass(frozen=True)
class Segment:
    """One run of text ids or the codes of one picture, without any control token."""

    kind: int
    """TEXT or IMAGE."""
    tokens: np.ndarray
    """int64 [n]: text ids, or raw codes 0..codebook_size-1."""
    answer: bool = False
    """Fine-tuning: part of an answer, so that it bears loss under `loss_on: answers`."""

    @property
    def mode(self) -> int:
        """The kind with the ANSWER bit, as the store keeps it."""
        return self.kind | (ANSWER if self.answer else 0)


@dataclass(frozen=True)
class Document:
    """One stored sample: a caption and its picture, a text, or any interleaving of texts and pictures."""

    doc_id: int
    """Global number in its store."""
    segments: tuple[Segment, ...]

    @property
    def shape(self) -> Shape:
        """Modes and lengths of the segments."""
        return tuple((segment.mode, len(segment.tokens)) for segment in self.segments)


def image_first(modes: Sequence[int]) -> bool:
    """Whether a document of these modes is a plain caption-then-picture pair, which rotation may turn round."""
    return tuple(modes) == (TEXT, IMAGE)


def rotate(document: Document) -> Document:
    """The picture of a caption-then-picture pair put first; any other document as it is."""
    if image_first([segment.mode for segment in document.segments]):
        return Document(document.doc_id, document.segments[::-1])
    return document


@dataclass(frozen=True)
class Layout:
    """How segments are joined into a sample: the control ids of one vocabulary."""

    vocabulary: Vocabulary
    turns: bool = False
    """Put `<end-of-turn>` where prompt and answer meet."""

    def _walk(self, shapes: Sequence[Shape]) -> Iterator[tuple[int, bool, tuple[int, int] | None]]:
        """The sample in order: (control id, bears answer loss, None) or (-1, same, (document, segment))."""
        vocabulary, chameleon = self.vocabulary, self.vocabulary.family == "chameleon"
        before: int | None = None
        answering = False
        yield vocabulary.bos, False, None
        for d, shape in enumerate(shapes):
            for s, (mode, _) in enumerate(shape):
                answer, picture = bool(mode & ANSWER), mode & 1 == IMAGE
                turn = self.turns and answer != answering
                if turn:
                    yield vocabulary.end_of_turn, answering, None
                if chameleon:
                    if picture:
                        yield vocabulary.boi, answer, None
                elif picture and turn and before is not None:
                    yield vocabulary.break_, answer, None
                elif before is not None and not turn and (s == 0 or picture or before == IMAGE):
                    yield vocabulary.break_, answer and answering, None
                yield -1, answer, (d, s)
                if chameleon and picture:
                    yield vocabulary.eoi, answer, None
                before, answering = mode & 1, answer
        yield vocabulary.eos, answering, None

    def length(self, shapes: Sequence[Shape]) -> int:
        """Tokens of the sample that `assemble` makes of documents with these shapes (retrieved ones first)."""
        controls = sum(1 for control, _, _ in self._walk(shapes) if control >= 0)
        return controls + sum(length for shape in shapes for _, length in shape)

    def assemble(self, documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
        """The sample of `documents` (retrieved ones first, the sample's own last).

        Returns tokens int64 [n] and answers bool [n] (True where the token bears loss under `loss_on: answers`).
        Raises DataError for a code outside the codebook.
        """
        parts, flags = [], []
        for control, answer, place in self._walk([document.shape for document in documents]):
            if place is None:
                parts.append(np.array([control], np.int64))
                flags.append((answer, 1))
                continue
            segment = documents[place[0]].segments[place[1]]
            picture = segment.kind == IMAGE
            parts.append(self.vocabulary.image_ids(segment.tokens) if picture else segment.tokens)
            flags.append((answer, len(segment.tokens)))
        tokens = np.concatenate(parts, dtype=np.int64)
        values, counts = zip(*flags, strict=True)
        answers = np.repeat(values, counts) if any(values) else np.zeros(len(tokens), bool)
        return tokens, answers

    def prefix(self, retrieved: Sequence[Document]) -> np.ndarray:
        """int64: the opening token and the retrieved documents, up to where the sample's own document begins."""
        tokens = self.assemble(retrieved)[0][:-1]
        if retrieved and self.vocabulary.family != "chameleon":
            tokens = np.append(tokens, self.vocabulary.break_)
        return tokens


def text_to_image_prompt(
    vocabulary: Vocabulary, text_ids: Sequence[int] | np.ndarray, retrieved: Sequence[Document] = ()
) -> np.ndarray:
    """int64 ids `</s> documents T B` (chameleon: `<s> documents T BOI`): the codes of a picture follow."""
    text = np.asarray(text_ids, np.int64)
    return np.concatenate([Layout(vocabulary).prefix(retrieved), text, [vocabulary.boi]], dtype=np.int64)


def unconditional_prompt(vocabulary: Vocabulary, retrieved: Sequence[Document] = ()) -> np.ndarray:
    """int64 ids `</s> documents <sentinel:0> B`: the text is masked, as training masks whole captions.

    Chameleon has no sentinels; its text is left away: `<s> documents BOI`.
    """
    masked = [vocabulary.sentinel(0)] if vocabulary.sentinels else []
    return text_to_image_prompt(vocabulary, masked, retrieved)


def infill_caption_prompt(vocabulary: Vocabulary, codes: np.ndarray, retrieved: Sequence[Document] = ()) -> np.ndarray:
    """int64 ids `</s> documents <sentinel:0> B I </s> <sentinel:0>`: the caption follows, then `<eoss>`.

    Raises ConfigError for a vocabulary without sentinels: there the text simply follows the picture.
    """
    if not vocabulary.sentinels:
        raise ConfigError(
            f"a vocabulary of family '{vocabulary.family}' has no sentinels, so that no caption can be infilled; "
            "use image_to_text_prompt"
        )
    layout = Layout(vocabulary)
    unknown = Segment(TEXT, np.zeros(1, np.int64))
    own = Document(-1, (unknown, Segment(IMAGE, np.asarray(codes, np.int64))))
    tokens, _ = layout.assemble([*retrieved, own])
    start = len(layout.prefix(retrieved))
    return cm3.infill_prompt(tokens, np.array([[start, start + 1]]), vocabulary)


def image_to_text_prompt(
    vocabulary: Vocabulary,
    codes: np.ndarray,
    text_ids: Sequence[int] | np.ndarray = (),
    turn: bool = False,
    retrieved: Sequence[Document] = (),
) -> np.ndarray:
    """int64 ids `<s> documents BOI I EOI T` of a picture and a question, with `turn` `<end-of-turn>`: text follows.

    For cm3leon the picture-first order `</s> documents I B T` of its plain fine-tuning; `</s> I <end-of-turn>` without
    a question.
    """
    segments = [Segment(IMAGE, np.asarray(codes, np.int64))]
    if len(text_ids) or not turn:
        segments.append(Segment(TEXT, np.asarray(text_ids, np.int64)))
    tokens = Layout(vocabulary).assemble([*retrieved, Document(-1, tuple(segments))])[0][:-1]
    return np.append(tokens, vocabulary.end_of_turn) if turn else tokens
