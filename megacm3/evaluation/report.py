"""The quickstart's report of one page: pictures, captions, reconstructions, neighbours, curves, timings."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megacm3.command import seed_from
from megacm3.evaluation import charts, retrieval_gain
from megacm3.evaluation.fidelity import Fidelity, Settings, measure
from megacm3.evaluation.page import Figure, Section, render
from megacm3.evaluation.pictures import Gallery, png_bytes, read_gallery, titled_sheets
from megacm3.files import new_file, read_json, write_json

if TYPE_CHECKING:
    from megacm3.inference.api import Generator

logger = logging.getLogger(__name__)

PROMPTS = 16
RECONSTRUCTIONS = 8
CAPTIONS = 4
QUERIES = 3


@dataclass(frozen=True)
class Places:
    """What the quickstart's report is made from and where it goes."""

    run: Path
    """Folder with hf/ and train/; of store/, neighbours/, {perplexity,retrieval}.json, timings.jsonl it shows what is
    there."""
    training: Sequence[str]
    """Paths or globs of the training pictures."""
    heldout: Sequence[str] = ()
    """Of the pictures kept out of training."""
    settings: Settings = field(default_factory=Settings)
    """Of the fidelity figure; its sampling holds for all pictures."""


def quickstart_report(places: Places, device: str = "cpu") -> Fidelity:
    """`report.html`, `samples.png` and `fidelity.json` in the run's folder; returns the fidelity figure.

    Raises DataError or CheckpointError when a part that it shows is missing.
    """
    from megacm3.inference.api import Generator

    generator = Generator.load(places.run / "hf", device)
    metrics = charts.read_lines(places.run / "train" / "metrics.jsonl")
    training = read_gallery(list(places.training), generator.image_size)
    heldout = read_gallery(list(places.heldout), generator.image_size) if places.heldout else training
    found = measure(generator, training, places.settings)
    prompts, pictures = _held_out_pictures(generator, heldout, places.settings)
    sections = [
        _samples(prompts, pictures, places.settings, bool(places.heldout)),
        _fidelity(found, training),
        _captions(generator, training, found),
        _reconstructions(generator, heldout, bool(places.heldout)),
    ]
    if (places.run / "neighbours").is_dir():
        sections.append(_neighbours(generator, places.run, training))
    if (places.run / "retrieval.json").is_file():
        sections.append(retrieval_gain.section(read_json(places.run / "retrieval.json")))
    sections.append(_curves(metrics, places.run / "perplexity.json"))
    cards = [(f"{found.fidelity:.0%}", f"fidelity of {places.settings.count} pictures")]
    cards += [(f"{found.reconstruction:.0%}", "fidelity of the image tokenizer alone"), *_loss_cards(metrics)]
    if (places.run / "timings.jsonl").is_file():
        timings, total = _timings(charts.read_lines(places.run / "timings.jsonl"))
        sections.append(timings)
        cards.append((_duration(total), "all steps"))
    lead = (
        f"A small CM3Leon trained on {len(training)} pictures of {generator.image_size} x {generator.image_size} "
        f"pixels, {generator.grid[0]} x {generator.grid[1]} codes each. "
        "Everything on this page was made by the run that it describes."
    )
    write_json(places.run / "fidelity.json", found.to_json(training))
    seen = [training.captions[i] for i in found.chosen[:PROMPTS]]
    sheets = titled_sheets(
        [
            ("Captions that were not in training" if places.heldout else "Captions", list(pictures), prompts),
            ("Captions from training", list(found.generated[:PROMPTS]), seen),
        ]
    )
    with new_file(places.run / "samples.png") as path:
        path.write_bytes(png_bytes(sheets, {"source": "made by a model (megacm3)"}))
    _write_text(places.run / "report.html", render("Quickstart report", lead, cards, sections))
    return found


def _write_text(path: Path, text: str) -> None:
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _pick(total: int, count: int, *key: str | int) -> list[int]:
    rng = np.random.Generator(np.random.PCG64(seed_from("report", *key)))
    return np.sort(rng.choice(total, min(count, total), replace=False)).tolist()


def _loss_cards(metrics: Sequence[dict]) -> list[tuple[str, str]]:
    cards = []
    for name, label in (("loss_image", "loss, image tokens"), ("loss_text", "loss, text tokens")):
        _, values = charts.series(metrics, name)
        if values:
            cards.append((f"{values[-1]:.2f}", f"{label}, at step {metrics[-1]['step']}"))
    return cards


def _curves(metrics: Sequence[dict], held_out: Path) -> Section:
    text = "Mean negative log-likelihood of the targets of a step, by modality; specials count in 'all tokens' only."
    if held_out.is_file():
        found = read_json(held_out)
        losses = [f"{found[name]['loss']:.2f} per {name} token" for name in ("image", "text") if name in found]
        text += f" On the {found['documents']} held-out documents, in plain order: {', '.join(losses)}."
    return Section("Training", text, charts=charts.panels(metrics))


def _held_out_pictures(generator: "Generator", gallery: Gallery, settings: Settings) -> tuple[list[str], np.ndarray]:
    prompts = [gallery.captions[i] for i in _pick(len(gallery), PROMPTS, "prompts", settings.seed)]
    options = {"guidance": settings.guidance, "temperature": settings.temperature, "top_p": settings.top_p}
    return prompts, generator.images(prompts, **options, top_k=settings.top_k, seed=settings.seed)[:, 0]


def _samples(prompts: Sequence[str], pictures: np.ndarray, settings: Settings, held_out: bool) -> Section:
    whose = "Captions that were kept out of training" if held_out else "Captions of the training split"
    text = (
        f"{whose}. Guidance {settings.guidance:g}, temperature {settings.temperature:g}, top-p {settings.top_p:g}, "
        f"seed {settings.seed}; no retrieved documents, no choice among samples."
    )
    figures = [Figure(picture, [prompt]) for picture, prompt in zip(pictures, prompts, strict=True)]
    return Section("Pictures for new prompts", text, [("", figures)], side=122)


def _fidelity(found: Fidelity, gallery: Gallery) -> Section:
    hits = sum(found.hits)
    text = (
        f"For {found.settings.count} captions drawn from the training split with seed {found.settings.seed}, the "
        f"training picture nearest to the generated one (pixel distance at 16 x 16, among {found.pictures}) has the "
        f"prompt's caption in {hits} cases: {found.fidelity:.0%}. The image tokenizer's own reconstructions, the "
        f"ceiling, reach {found.reconstruction:.0%}; by chance it would be {1 / found.pictures:.1%}. "
        "Green frame: a hit."
    )
    figures = []
    for i, hit in enumerate(found.hits):
        lines = [gallery.captions[found.chosen[i]]]
        if not hit:
            lines.append(f"nearest: {gallery.captions[found.nearest[i]]}")
        pair = np.concatenate((gallery.pixels[found.chosen[i]], found.generated[i]), axis=1)
        figures.append(Figure(pair, lines, "good" if hit else "bad"))
    return Section("Fidelity", text, [("Training picture left, generated picture right", figures)], side=168)


def _captions(generator: "Generator", gallery: Gallery, found: Fidelity) -> Section:
    chosen = found.chosen[:: max(1, len(found.chosen) // CAPTIONS)][:CAPTIONS]
    texts = generator.caption(gallery.pixels[chosen])
    figures = [
        Figure(gallery.pixels[i], [f"filled in: {text or '(nothing)'}", f"caption: {gallery.captions[i]}"])
        for i, text in zip(chosen, texts, strict=True)
    ]
    text = "The caption in front of a picture is masked, and the model fills it in behind the picture (CM3 infilling)."
    return Section("Text from pictures", text, [("", figures)], side=190)


def _reconstructions(generator: "Generator", gallery: Gallery, held_out: bool) -> Section:
    codes = generator.encode(gallery.pixels)
    decoded = generator.image_tokenizer.decode(codes).numpy()
    error = ((decoded.astype(np.float64) - gallery.pixels) ** 2).mean((1, 2, 3))
    quality = 10 * np.log10(255**2 / np.maximum(error, 1e-9))
    used = len(np.unique(codes))
    which = "kept out of training" if held_out else "of the training split"
    text = (
        f"Original left, through {codes.shape[1]} codes and back right. Over the {len(gallery)} pictures {which}: "
        f"{quality.mean():.1f} dB mean PSNR, {used} of {generator.vocabulary.codebook_size} codes in use."
    )
    figures = [
        Figure(np.concatenate((gallery.pixels[i], decoded[i]), axis=1), [gallery.captions[i], f"{quality[i]:.1f} dB"])
        for i in _pick(len(gallery), RECONSTRUCTIONS, "reconstructions")
    ]
    return Section("Image tokenizer", text, [("", figures)], side=168)


def _neighbours(generator: "Generator", run: Path, gallery: Gallery) -> Section:
    from megacm3.data.store import Store
    from megacm3.retrieval.neighbours import NeighbourTable

    store, table = Store.open(run / "store"), NeighbourTable.open(run / "neighbours")
    known = {key: i for i, key in enumerate(gallery.keys)}
    rows = store.metadata(["key", "caption"]).to_pylist()

    def figure(doc_id: int, note: str) -> Figure:
        row = rows[doc_id]
        if row["key"] in known:
            picture = gallery.pixels[known[row["key"]]]
        else:
            codes = next(s.tokens for s in store.document(doc_id).segments if s.kind == 1)
            picture = generator.image_tokenizer.decode(codes[None]).numpy()[0]
        return Figure(picture, [row["caption"], note])

    groups = []
    for doc_id in _pick(len(store), QUERIES, "queries"):
        figures = [figure(doc_id, "query")]
        for kind in ("image", "text"):
            ids, scores = table.candidates(doc_id, kind)
            pairs = [(int(i), float(s)) for i, s in zip(ids, scores, strict=True) if i >= 0][:4]
            figures += [figure(i, f"by {kind}, {score:.2f}") for i, score in pairs]
        groups.append((rows[doc_id]["caption"], figures))
    text = (
        "What the memory bank returns for three training documents, by their picture and by their text, with the inner "
        "product of the vectors. Training draws from such lists the documents that stand in front of a sample."
    )
    return Section("Retrieved neighbours", text, groups, side=104)


def _timings(lines: Sequence[dict]) -> tuple[Section, float]:
    last = {line["step"]: float(line["seconds"]) for line in lines}  # a step that ran again counts as it ran last
    total = sum(last.values())
    rows = [[step, _duration(seconds), f"{seconds / max(total, 1e-9):.0%}"] for step, seconds in last.items()]
    return Section("Time", table=(["step", "time", "share"], [*rows, ["all", _duration(total), ""]])), total


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
