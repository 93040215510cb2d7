"""Both models' answers as files that tools/compare_people.py puts on a blind page."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megacm3.data.documents import IMAGE
from megacm3.evaluation.answer_files import AnswerRow, write_answers
from megacm3.evaluation.pictures import png_bytes

if TYPE_CHECKING:
    from megacm3.evaluation.answers import Answers, Question
    from megacm3.inference.api import Generator


def write_for_people(
    generator: "Generator", questions: "list[Question]", answers: "dict[str, Answers]", folder: Path
) -> None:
    """`folder/NAME.jsonl` for each model, and the pictures that they name."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[AnswerRow]] = {name: [] for name in answers}
    for number, question in enumerate(questions):
        given = [segment for segment in question.document.segments if not segment.answer]
        texts = [generator.text_tokenizer.decode(s.tokens.tolist()).strip() for s in given if s.kind != IMAGE]
        codes = [segment.tokens for segment in given if segment.kind == IMAGE]
        shown = [_save(generator, one, folder, f"given_{number:05d}_{i}.png") for i, one in enumerate(codes)]
        for name, found in answers.items():
            drawn = found.codes[number]
            images = () if drawn is None else (_save(generator, drawn, folder, f"{name}_{number:05d}.png"),)
            prompt = " ".join(texts)
            rows[name].append(AnswerRow(question.key, prompt, found.texts[number], images, tuple(shown), question.task))
    for name, lines in rows.items():
        write_answers(folder / f"{name}.jsonl", lines)


def _save(generator: "Generator", codes: np.ndarray, folder: Path, name: str) -> str:
    pixels = generator.image_tokenizer.decode(np.array(codes)[None]).numpy()[0]
    (folder / name).write_bytes(png_bytes(pixels))
    return name
