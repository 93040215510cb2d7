"""A page to look at a token store: pictures, captions, sequences as the model sees them, neighbours, statistics."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from megacm3.command import seed_from
from megacm3.config import Config
from megacm3.data import cm3
from megacm3.data.build import build_stream
from megacm3.data.documents import IMAGE, Document, Layout
from megacm3.data.statistics import StoreStatistics, StreamStatistics, store_statistics, stream_statistics
from megacm3.data.store import Store
from megacm3.data.stream import PackedSequence, Stream
from megacm3.errors import ConfigError, DataError
from megacm3.evaluation.page import Figure, Section, render
from megacm3.files import read_manifest
from megacm3.resolve import load_config
from megacm3.retrieval.sampler import open_sampler
from megacm3.tokenizers.image import ImageTokenizer
from megacm3.tokenizers.text import TextTokenizer
from megacm3.tokenizers.vocabulary import Vocabulary

_STYLE = Markup("""<style>
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


def view_store(
    folder: str,
    *,
    config: str | None = None,
    overrides: Sequence[str] = (),
    neighbours: str = "",
    text_tokenizer: str = "",
    image_tokenizer: str = "",
    documents: int = 24,
    sequences: int = 6,
    seed: int = 0,
) -> str:
    """The page of the store `folder`, with the stream of a run's `config` or, without one, of the usual settings.

    Tokenizers that are not named are looked for beside the store. Raises DataError or ConfigError for what is missing,
    damaged or does not belong to the store.
    """
    store = Store.open(folder)
    stream = build_stream(_config(store, config, overrides, neighbours))
    text = _tokenizer(store, "text_tokenizer", text_tokenizer)
    image = _tokenizer(store, "image_tokenizer", image_tokenizer)
    decoders = Decoders(
        stream.vocabulary, TextTokenizer.load(text) if text else None, ImageTokenizer.load(image) if image else None
    )
    rng = np.random.Generator(np.random.PCG64(seed_from("view", seed)))
    chosen = np.sort(rng.choice(len(store), min(documents, len(store)), replace=False)).tolist()
    table = open_sampler(neighbours, store.fingerprint, len(store)).table if neighbours else None
    return view_page(str(folder), stream, decoders, table, chosen, range(sequences))


def _config(store: Store, path: str | None, overrides: Sequence[str], neighbours: str) -> Config:
    mixture = f"data.mixture=[{{store: '{store.folder}', neighbours: '{neighbours}'}}]"
    if path:
        return load_config(path, [mixture, "data.stages=[]", *overrides])
    vocabulary = store.vocabulary()
    own = Layout(vocabulary).length([tuple(store.segment_lengths(store.longest()))])
    cm3leon = vocabulary.family == "cm3leon"
    settings = {
        "model.family": vocabulary.family,
        "model.vocab_size": vocabulary.size,
        # Room for three retrieved documents, or as many samples, and a few spans.
        "model.sequence_length": 4 * own + 16,
        "objective.kind": "cm3" if cm3leon else "causal",
        "objective.sentinels": max(1, vocabulary.sentinels),
        "data.packing": "whole",
        "data.rotation": 0.0 if cm3leon else 0.5,
        "train.steps": 1,
    }
    return load_config(None, [mixture, *(f"{key}={value}" for key, value in settings.items()), *overrides])


def _tokenizer(store: Store, role: str, given: str) -> str:
    """Folder of the store's tokenizer: `given`, or the one beside the store, or nothing."""
    folder = Path(given) if given else store.folder.parent / role
    if not given and not folder.is_dir():
        return ""
    found, expected = read_manifest(folder, role).fingerprint, store.inputs.get(role)
    if found == expected:
        return str(folder)
    if not given:
        return ""
    flag = role.replace("_", "-")
    raise DataError(
        f"--{flag} {folder} has fingerprint {found[:12]}; {store.folder} was made with {str(expected)[:12]}"
    )


def view_page(
    name: str,
    stream: Stream,
    decoders: Decoders,
    neighbours: Any = None,
    documents: Sequence[int] = (),
    sequences: Sequence[int] = (),
) -> str:
    """The page of the stream's first store: `documents` by number, `sequences` of the stream by number.

    neighbours: a `NeighbourTable` of the store, or None.
    """
    store = stream.sources[0].store
    stored, streamed = store_statistics(store), stream_statistics(stream)
    cards = [
        (f"{stored.documents:,}", "documents"),
        (f"{stored.lengths.mean():,.0f}", "tokens a document"),
        (f"{stored.image_share:.1%}", "image tokens"),
        (f"{streamed.shares['padding']:.2%}", "padding"),
        (f"{streamed.shares['cut']:.2%}", "cut at windows' ends"),
        (f"{streamed.shares['left_out']:.2%}", "retrieved but left out"),
    ]
    chosen = [store.document(doc_id) for doc_id in documents]
    sections = [
        Section("Documents", "As stored, drawn at random.", [("", [f for d in chosen for f in _figures(d, decoders)])]),
        _neighbour_section(stream, neighbours, chosen, decoders),
        _sequence_section(stream, sequences, decoders),
        _statistics_section(stream, stored, streamed),
    ]
    lead = f"{stream.settings.packing} packing, {stream.settings.sequence_length} tokens a sequence"
    return render(name, lead, cards, [section for section in sections if section is not None])


def _figures(document: Document, decoders: Decoders, note: str = "") -> list[Figure]:
    """Each picture of a document with the text before it; a text alone as an empty picture."""
    figures, texts = [], [f"{document.doc_id}{note}"]
    for segment in document.segments:
        if segment.kind != IMAGE:
            texts.append(("answer: " if segment.answer else "") + decoders.caption(segment.tokens).strip())
            continue
        texts += ["answer:"] if segment.answer else []
        picture = decoders.picture(segment.tokens)
        figures.append(Figure(_no_picture() if picture is None else picture, texts))
        texts = []
    if figures and texts:
        figures[-1] = Figure(figures[-1].picture, [*figures[-1].lines, *texts])
    return figures or [Figure(_no_picture(), texts)]


def _no_picture() -> np.ndarray:
    return np.full((8, 8, 3), 238, np.uint8)


def _neighbour_section(stream: Stream, table: Any, chosen: list[Document], decoders: Decoders) -> Section | None:
    if table is None:
        return None
    store, groups = stream.sources[0].store, []
    for document in chosen[:6]:
        for kind in ("image", "text"):
            ids, scores = table.candidates(document.doc_id, kind)
            row = _figures(document, decoders)[:1]
            for other, score in list(zip(ids.tolist(), scores.tolist(), strict=True))[:7]:
                if other >= 0:
                    row += _figures(store.document(other), decoders, f"   score {score:.3f}")[:1]
            groups.append((f"document {document.doc_id}, by its {kind}", row))
    return Section("Neighbours", "First the document, then its candidates before any filter.", groups)


def _sequence_section(stream: Stream, numbers: Sequence[int], decoders: Decoders) -> Section:
    fragments = [str(_STYLE)]
    for number in numbers:
        sequence, counts = stream.sequence(number), stream.counts(number)
        samples = ", ".join(f"{d.documents[-1]} (with {len(d.documents) - 1} retrieved)" for d in stream.drawn(number))
        title = f"sequence {number}: {counts['spans']} spans, {counts['padding']} padding; documents {samples}"
        fragments.append(Markup("<h3>{}</h3>").format(title))
        for unit, answers in _units(stream, sequence):
            parts = _both(unit, answers, decoders)
            fragments += [Markup('<div class="tokens">{}</div>').format(part) for part in parts]
    text = (
        "Above as it was assembled, with masked spans framed; below as the model reads it. Answers have a green border."
    )
    return Section("Sequences", text, fragments=[str(fragment) for fragment in fragments])


def _units(stream: Stream, sequence: PackedSequence) -> list[tuple[np.ndarray, np.ndarray]]:
    """The parts of a sequence that were rearranged on their own, without padding: tokens, and which are answers."""
    kept = sequence.tokens != stream.vocabulary.pad
    real, answers = sequence.tokens[kept], sequence.answers[kept]
    if not stream.settings.document_mask:
        return [(real, answers)]
    index = np.append(sequence.documents, sequence.documents[-1])[: len(real)]
    return [(real[index == i], answers[index == i]) for i in range(len(sequence.samples))]


def _both(tokens: np.ndarray, answers: np.ndarray, decoders: Decoders) -> list[Markup]:
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


def _statistics_section(stream: Stream, stored: StoreStatistics, streamed: StreamStatistics) -> Section:
    shares = [[name.replace("_", " "), f"{value:.3%}"] for name, value in streamed.shares.items()]
    patterns = [[f"documents: {name}", f"{count / stored.sampled:.1%}"] for name, count in stored.patterns.items()]
    spans = [[f"sequences with {n} spans", f"{c / streamed.sequences:.1%}"] for n, c in enumerate(streamed.spans)]
    counts = [[f"{name.replace('_', ' ')} (first window)", f"{value:,}"] for name, value in streamed.counts.items()]
    charts = [
        _histogram(stored.text_lengths, "tokens of a text segment"),
        _histogram(stored.lengths, "tokens of a document"),
        _histogram(streamed.sample_lengths, "tokens of a sample, retrieved documents included"),
    ]
    text = f"{stored.sampled:,} documents and the {streamed.sequences:,} sequences of the first window."
    table = (["", ""], [*shares, *patterns[:8], *spans[:6], *counts])
    return Section("Statistics", text, charts=[str(chart) for chart in charts], table=table)


def _histogram(values: np.ndarray, label: str, width: int = 330, height: int = 110) -> Markup:
    """An SVG of at most 40 bars."""
    if not len(values):
        return Markup("")
    low, high = int(values.min()), int(values.max())
    counts, edges = np.histogram(values, bins=min(40, high - low + 1), range=(low, high + 1))
    step = width / len(counts)
    bars = Markup("").join(
        Markup(
            '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="#2e6f95"><title>{}: {}</title></rect>'
        ).format(i * step, height - bar, max(1.0, step - 1), bar, f"{edges[i]:.0f}", int(count))
        for i, count in enumerate(counts)
        for bar in [height * count / counts.max()]
    )
    text = Markup('<text x="{}" y="{}" font-size="12" text-anchor="{}" fill="#59636e">{}</text>')
    ends = text.format(0, height + 14, "start", f"{low:,}") + text.format(width, height + 14, "end", f"{high:,}")
    title = text.format(width / 2, height + 30, "middle", label)
    frame = Markup('<svg width="{}" height="{}" viewBox="0 0 {} {}">{}</svg>')
    return frame.format(width, height + 36, width, height + 36, bars + ends + title)
