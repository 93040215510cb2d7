"""A page to look at a token store: pictures, captions, sequences as the model sees them, neighbours, statistics."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from megacm3.command import seed_from
from megacm3.config import Config
from megacm3.data.build import build_stream
from megacm3.data.documents import IMAGE, Document, Layout
from megacm3.data.statistics import StoreStatistics, StreamStatistics, store_statistics, stream_statistics
from megacm3.data.store import Store
from megacm3.data.stream import PackedSequence, Stream
from megacm3.errors import DataError
from megacm3.evaluation.page import Figure, Section, render
from megacm3.evaluation.token_markup import STYLE, Decoders, rearranged
from megacm3.files import read_manifest
from megacm3.resolve import load_config
from megacm3.retrieval.sampler import open_sampler
from megacm3.tokenizers.image import ImageTokenizer
from megacm3.tokenizers.text import TextTokenizer


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
    fragments = [str(STYLE)]
    for number in numbers:
        sequence, counts = stream.sequence(number), stream.counts(number)
        samples = ", ".join(f"{d.documents[-1]} (with {len(d.documents) - 1} retrieved)" for d in stream.drawn(number))
        title = f"sequence {number}: {counts['spans']} spans, {counts['padding']} padding; documents {samples}"
        fragments.append(Markup("<h3>{}</h3>").format(title))
        for unit, answers in _units(stream, sequence):
            parts = rearranged(unit, answers, decoders)
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
