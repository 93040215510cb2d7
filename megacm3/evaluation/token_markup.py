"""Tokens of a sequence as HTML: text, pictures, control tokens, frames around masked spans."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from megacm3.data import cm3
from megacm3.errors import ConfigError
from megacm3.evaluation.page import Figure
from megacm3.tokenizers.vocabulary import Vocabulary

STYLE = Markup("""<style>
.tokens { border: 1px solid var(--line); border-radius: 8px; padding: 10px; margin: 0 0 14px; line-height: 2;
  font-size: 13px; overflow-wrap: anywhere; }
.tokens b { font: 11px/1.6 ui-monospace, "DejaVu Sans Mono", monospace; border-radius: 4px; padding: 1px 4px;
  margin: 0 2px; background: #e7eaee; color: #444c56; white-space: nowrap; }
.tokens .t { background: #dff1e3; border-radius: 4px; padding: 2px 4px; white-space: pre-wrap; }
.tokens .i { display: inline-block; vertical-align: middle; background: #dce9fb; border-radius: 4px; padding: 2px 4px; }
.tokens .i img { height: 44px; image-rendering: pixelated; display: block; }
.tokens .a { outline: 2px solid #1f7a3d; outline-offset: -1px; }
.tokens .m { display: inline-block; border-radius: 6px; padding: 1px 0; line-height: 1.6; }
.m0 { box-shadow: 0 0 0 3px #f2b53b; } .m1 { box-shadow: 0 0 0 3px #d1495b; } .m2 { box-shadow: 0 0 0 3px #7b5cc4; }
.m3 { box-shadow: 0 0 0 3px #2e9c8f; } .m4 { box-shadow: 0 0 0 3px #8a8f98; }
</style>""")


@dataclass
class Decoders:
    """How tokens are shown; what is None is shown as numbers."""

    vocabulary: Vocabulary
    text: Any = None
    """A `TextTokenizer`."""
    image: Any = None
    """An `ImageTokenizer`."""
    _decoded: dict[bytes, np.ndarray] = field(default_factory=dict)

    def caption(self, ids: np.ndarray) -> str:
        """The text of text ids."""
        return self.text.decode(ids) if self.text is not None else " ".join(str(i) for i in ids.tolist())

    def picture(self, codes: np.ndarray) -> np.ndarray | None:
        """uint8 [s, s, 3] of a whole picture's codes, or None without an image tokenizer."""
        if self.image is None:
            return None
        key = codes.tobytes()
        if key not in self._decoded:
            self._decoded[key] = self.image.decode(codes[None])[0].numpy()
        return self._decoded[key]


def rearranged(tokens: np.ndarray, answers: np.ndarray, decoders: Decoders) -> list[Markup]:
    """A unit as assembled, with frames around its masked spans, and as rearranged where it has spans."""
    vocabulary, own = decoders.vocabulary, np.arange(len(tokens))
    try:
        source, spans = cm3.split_tail(tokens, vocabulary)
    except ConfigError:
        # A block may end in the middle of a sample that was rearranged on its own.
        return [_html(tokens, own, tokens, answers, decoders)]
    if not spans:
        return [_html(tokens, own, tokens, answers, decoders)]
    first = vocabulary.sentinel(0)
    marks = np.flatnonzero((source >= first) & (source < first + len(spans)))
    pieces = [piece[1:] if i else piece for i, piece in enumerate(np.split(source, marks))]
    # Pieces and spans in turn make the assembled sequence; places says where each of them lies in it.
    joined = [part for pair in zip(pieces, [*spans, source[:0]], strict=True) for part in pair]
    whole = np.concatenate(joined)
    # Where these tokens stand in `tokens`: in the tail each span lies between its sentinel and its end.
    ends = len(source) + np.cumsum([len(span) + 2 for span in spans]) - 1
    kept = [piece[1:] if i else piece for i, piece in enumerate(np.split(own[: len(source)], marks))]
    moved = [own[end - len(span) : end] for span, end in zip(spans, ends, strict=True)]
    origin = np.concatenate([part for pair in zip(kept, [*moved, own[:0]], strict=True) for part in pair])
    flags = answers[origin]
    assert np.array_equal(tokens[origin], whole)
    places = np.split(np.arange(len(whole)), np.cumsum([len(part) for part in joined])[:-1])
    assembled = Markup("")
    for i, (part, place) in enumerate(zip(joined, places, strict=True)):
        inner = _html(part, place, whole, flags, decoders)
        assembled += Markup('<span class="m m{}">{}</span>').format(i // 2 % 5, inner) if i % 2 and len(part) else inner
    none = np.array([-1])
    front = [array for place in places[0::2] for array in (none, place)][1:]
    tail = [array for place in places[1::2][:-1] for array in (none, place, none)]
    return [assembled, _html(tokens, np.concatenate([*front, *tail]), whole, flags, decoders)]


def _html(tokens: np.ndarray, places: np.ndarray, whole: np.ndarray, flags: np.ndarray, decoders: Decoders) -> Markup:
    """Tokens as coloured runs of text, pictures and control tokens.

    places: int64, where each stands in `whole`, -1 for what CM3 added. flags: bool, which of `whole` are answers.
    """
    vocabulary = decoders.vocabulary
    kinds = vocabulary.kind[tokens]
    control = cm3.is_control(vocabulary)[tokens]
    answer = (places >= 0) & flags[places] & ~control if len(whole) else control
    starts = np.flatnonzero((kinds[1:] != kinds[:-1]) | control[1:] | (answer[1:] != answer[:-1])) + 1
    out = Markup("")
    for run, place in zip(np.split(tokens, starts), np.split(places, starts), strict=True) if len(tokens) else []:
        if cm3.is_control(vocabulary)[run[0]]:
            out += _badge(int(run[0]), vocabulary)
        elif vocabulary.is_image(run[:1])[0]:
            out += _picture(place, whole, " a" if flags[place[0]] else "", decoders)
        else:
            mark = " a" if flags[place[0]] else ""
            out += Markup('<span class="t{}">{}</span>').format(mark, decoders.caption(run))
    return out


def _badge(token: int, vocabulary: Vocabulary) -> Markup:
    number = token - vocabulary.sentinel(0) if vocabulary.sentinels else -1
    if 0 <= number < vocabulary.sentinels:
        return Markup('<b class="m{}">sentinel {}</b>').format(number % 5, number)
    name = next((name for name, i in vocabulary.special if i == token), str(token))
    return Markup("<b>{}</b>").format(name)


def _picture(place: np.ndarray, whole: np.ndarray, mark: str, decoders: Decoders) -> Markup:
    """The picture that the codes at `place` of `whole` belong to, the rest of it pale; a number where it is cut."""
    size, vocabulary = decoders.vocabulary.image_tokens, decoders.vocabulary
    is_image = vocabulary.is_image(whole)
    begin, end = int(place[0]), int(place[-1]) + 1
    while begin > 0 and is_image[begin - 1]:
        begin -= 1
    while end < len(whole) and is_image[end]:
        end += 1
    label = Markup('<span class="i{}">{} of {} codes</span>').format(mark, len(place), size)
    picture = decoders.picture(vocabulary.codes(whole[begin:end])) if end - begin == size else None
    if picture is None:
        return label
    rows, columns = decoders.image.grid
    shown = np.isin(np.arange(begin, end), place).reshape(rows, columns)
    pixels = np.kron(shown, np.ones((picture.shape[0] // rows, picture.shape[1] // columns), bool))[..., None]
    picture = np.where(pixels, picture, 255 - (255 - picture.astype(np.int64)) // 5).astype(np.uint8)
    shape = Markup('<span class="i{}"><img alt="{} codes" src="{}"></span>')
    return shape.format(mark, len(place), Figure(picture).source)
