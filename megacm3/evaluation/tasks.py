"""The tasks of tools/evaluate.py that draw or answer: FID, CLIPScore, captions, questions; and a page of them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megacm3.errors import ConfigError, DataError
from megacm3.evaluation.captions import score_captions
from megacm3.evaluation.distances import clip_score, frechet_distance
from megacm3.evaluation.page import Figure, Section, write_page
from megacm3.evaluation.pictures import Gallery, load_picture, read_gallery
from megacm3.evaluation.vqa import accuracy, read_people
from megacm3.retrieval.encoder import Encoder

if TYPE_CHECKING:
    from megacm3.inference.api import Generator

QUESTION, STOP = "Question: {question} Answer:", "."
"""What stands before and behind the answer in the first of the templates of fine-tuning (sft/tasks.yaml)."""
BATCH = 32
SHOWN = 32


@dataclass
class Measured:
    """A task's figures, and the pictures and texts behind them."""

    figures: dict[str, Any]
    shown: list[Figure] = field(default_factory=list)

    def write_report(self, path: str, title: str) -> None:
        """One page: the figures as cards, then the pictures."""
        cards = [(f"{value:.4g}", name) for name, value in self.figures.items() if isinstance(value, float)]
        lead = json.dumps(self.figures.get("protocol", {}))
        write_page(path, title, lead, cards, [Section("Pictures", groups=[("", self.shown)], side=144)])


def draw_pictures(
    generator: "Generator", captions: Sequence[str], *, seed: int, guidance: float, temperature: float, top_p: float
) -> np.ndarray:
    """One picture uint8 [n, s, s, 3] for each caption."""
    options = {"seed": seed, "guidance": guidance, "temperature": temperature, "top_p": top_p}
    blocks = [
        generator.images(captions[start : start + BATCH], **options)[:, 0] for start in range(0, len(captions), BATCH)
    ]
    return np.concatenate(blocks)


def fid_task(generator: "Generator", gallery: Gallery, encoder: Encoder, **drawing: Any) -> Measured:
    """FID between pictures drawn for a gallery's captions and the gallery's own."""
    made = draw_pictures(generator, gallery.captions, **drawing)
    return Measured(frechet_distance(gallery.pixels, made, encoder) | {"drawing": drawing}, _drawn(gallery, made))


def clip_task(generator: "Generator", gallery: Gallery, encoder: Encoder, **drawing: Any) -> Measured:
    """CLIPScore of pictures drawn for a gallery's captions, beside that of the gallery's own."""
    made = draw_pictures(generator, gallery.captions, **drawing)
    figures = clip_score(made, gallery.captions, encoder)
    figures["real_pictures"] = clip_score(gallery.pixels, gallery.captions, encoder)["clip_score"]
    return Measured(figures | {"drawing": drawing}, _drawn(gallery, made))


def _drawn(gallery: Gallery, made: np.ndarray) -> list[Figure]:
    return [Figure(picture, [caption]) for picture, caption in zip(made[:SHOWN], gallery.captions, strict=False)]


def caption_task(generator: "Generator", gallery: Gallery) -> Measured:
    """CIDEr, BLEU and ROUGE-L of the model's captions; a picture that stands several times has all its captions."""
    references: dict[bytes, list[str]] = {}
    first: dict[bytes, int] = {}
    for number, caption in enumerate(gallery.captions):
        picture = gallery.pixels[number].tobytes()
        references.setdefault(picture, []).append(caption)
        first.setdefault(picture, number)
    pictures = gallery.pixels[list(first.values())]
    captions = [
        text for start in range(0, len(pictures), BATCH) for text in generator.caption(pictures[start : start + BATCH])
    ]
    figures: dict[str, Any] = {"pictures": len(pictures), **score_captions(captions, list(references.values()))}
    rows = zip(pictures[:SHOWN], captions, references.values(), strict=False)
    return Measured(figures, [Figure(picture, [text, *wanted[:1]]) for picture, text, wanted in rows])


def vqa_task(generator: "Generator", inputs: Sequence[str], images: str, limit: int | None) -> Measured:
    """VQA accuracy on a release's questions and annotations, or on jsonl rows of image, question and answers.

    Raises DataError for rows without what is needed, ConfigError for a missing picture folder.
    """
    rows = list(_questions(inputs, images))[:limit]
    if not rows:
        raise DataError(f"{', '.join(inputs)} holds no question with a picture and answers")
    given: list[str] = []
    figures, values = [], []
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        pictures = np.stack([load_picture(row["image"], generator.image_size, generator.framing) for row in some])
        prompts = [QUESTION.format(question=row["question"]) for row in some]
        texts = generator.caption(pictures, prompt=prompts, after=STOP, max_tokens=16)
        given += texts
        for picture, row, text in zip(pictures, some, texts, strict=True):
            values.append(accuracy(text, row["answers"]))
            mark = "good" if values[-1] > 0.5 else "bad"
            figures.append(Figure(picture, [row["question"], text, row["answers"][0]], mark))
    result = {"vqa_accuracy": float(np.mean(values)), "questions": len(rows), "answers": given}
    return Measured(result, figures[:SHOWN])


def _questions(inputs: Sequence[str], images: str) -> Iterable[dict[str, Any]]:
    """Rows of image (path), question and answers."""
    if all(path.endswith(".jsonl") for path in inputs):
        for path in inputs:
            yield from _plain_rows(Path(path), images)
        return
    from megacm3.sft import releases

    if not images or not Path(images).is_dir():
        raise ConfigError(f"--images {images or '(not given)'} is no folder; expected the release's pictures")
    people: dict[str, list[str]] = {}
    for path in inputs:
        people |= read_people(path)
    for record in releases.load(tuple(inputs), "val"):
        if isinstance(record, dict) and str(record["key"]) in people:
            row = {"image": str(Path(images) / record["image"]), "question": record["question"]}
            yield row | {"answers": people[str(record["key"])]}


def _plain_rows(path: Path, images: str) -> Iterable[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as fault:
        raise DataError(f"--input {path} cannot be read: {fault.strerror}") from fault
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            answers = [str(answer) for answer in row["answers"]]
            yield {"image": str(Path(images or path.parent) / row["image"]), "question": str(row["question"])} | {
                "answers": answers
            }
        except (ValueError, KeyError, TypeError) as fault:
            raise DataError(
                f"{path}, line {number}: {type(fault).__name__} {fault}; expected image, question and answers"
            ) from fault


def gallery_of(inputs: Sequence[str], generator: "Generator", limit: int | None) -> Gallery:
    """Pictures with captions, as the model's image tokenizer takes them."""
    return read_gallery(inputs, generator.image_size, limit)
