"""What fine-tuning changed: a model before and after it, on held-out documents, in figures, pictures and one page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacm3.data.documents import IMAGE, Layout
from megacm3.data.store import Store
from megacm3.errors import DataError
from megacm3.evaluation.answers import Answers, Question, answer_all, chance, choose_questions, wanted_text
from megacm3.evaluation.charts import loss_chart, read_lines
from megacm3.evaluation.for_people import write_for_people
from megacm3.evaluation.page import Figure, Section, render
from megacm3.evaluation.perplexity import check_store
from megacm3.evaluation.pictures import png_bytes, titled_sheets
from megacm3.files import new_file, write_json
from megacm3.inference.api import Generator

NAMES = ("base", "tuned")


@dataclass(frozen=True)
class Comparison:
    """Two models' answers to the same questions."""

    questions: list[Question]
    answers: dict[str, Answers]
    """base and tuned."""

    def tasks(self) -> dict[str, list[int]]:
        """Task -> numbers of its questions."""
        found: dict[str, list[int]] = {}
        for number, question in enumerate(self.questions):
            found.setdefault(question.task, []).append(number)
        return found

    def figures(self) -> dict[str, Any]:
        """For each task: questions, chance, and of each model the loss of the true answers and the share right."""
        table = {}
        for task, numbers in self.tasks().items():
            row: dict[str, Any] = {"questions": len(numbers), "chance": chance([self.questions[i] for i in numbers])}
            for name, answers in self.answers.items():
                lists = {"loss": np.array(answers.losses), "right": np.array(answers.right)}
                if not self.questions[numbers[0]].picture:
                    lists["words"] = np.array(answers.overlaps)
                row[name] = {key: float(values[numbers].mean()) for key, values in lists.items()}
            table[task] = row
        return table


def compare_models(
    base: str, tuned: str, store: str, *, count: int, alike: str = "", seed: int = 0, device: str = "cpu"
) -> tuple[Comparison, Generator]:
    """Ask both. Raises DataError or CheckpointError where models and store do not belong together."""
    held_out = Store.open(store)
    after = Generator.load(tuned, device)
    check_store(after, held_out)
    # As the tuned model was trained: the base sees the same prompts.
    layout = Layout(after.vocabulary, after.turns)
    questions = choose_questions(held_out, layout, count, alike, seed)
    before = Generator.load(base, device)
    if before.vocabulary.fingerprint != after.vocabulary.fingerprint:
        raise DataError(f"--base {base} and --tuned {tuned} have different vocabularies; expected the same model's")
    models = dict(zip(NAMES, (before, after), strict=True))
    answers = {name: answer_all(model, questions, layout, seed=seed) for name, model in models.items()}
    return Comparison(questions, answers), after


def write_tuning_report(found: Comparison, generator: Generator, output: Path, run: str = "", shown: int = 8) -> None:
    """Write report.html, samples.png, answers.json and people/ into `output`. run: the tuning's folder."""
    output.mkdir(parents=True, exist_ok=True)
    table = found.figures()
    write_json(output / "answers.json", {"tasks": table, "rows": _rows(found, generator)})
    write_for_people(generator, found.questions, found.answers, output / "people")
    sections = [_summary(table)]
    if run:
        sections.append(Section("Training", charts=[loss_chart(read_lines(Path(run) / "metrics.jsonl"))]))
    sheets = []
    for task, numbers in found.tasks().items():
        groups = [_figures(found, generator, number) for number in _evenly(numbers, shown)]
        flat = [figure for _, figures in groups for figure in figures]
        texts = not found.questions[numbers[0]].picture
        sections.append(Section(task, _note(texts), [("", flat)] if texts else groups, side=176 if texts else 104))
        # The sheet has room for two short lines under a picture.
        labels = [figure.lines[-1] if texts else figure.lines[0] for figure in flat]
        sheets.append((task, [figure.picture for figure in flat], labels))
    cards = [
        (f"{row['tuned']['right']:.0%}", f"{task} right; base {row['base']['right']:.0%}")
        for task, row in table.items()
    ]
    lead = "The model before and after fine-tuning, given the same prompts of held-out documents."
    with new_file(output / "report.html") as path:
        path.write_text(render("Base and tuned", lead, cards, sections), encoding="utf-8")
    with new_file(output / "samples.png") as path:
        path.write_bytes(png_bytes(titled_sheets(sheets, columns=12)))


def _evenly(numbers: Sequence[int], count: int) -> list[int]:
    return [numbers[i * len(numbers) // min(count, len(numbers))] for i in range(min(count, len(numbers)))]


def _summary(table: dict[str, Any]) -> Section:
    heads = ["task", "questions", "chance", *(f"{n} {what}" for what in ("right", "words", "loss") for n in NAMES)]
    rows = []
    for task, row in table.items():
        shares = [f"{value:.1%}" for value in (row["chance"], row["base"]["right"], row["tuned"]["right"])]
        shares += [f"{row[name]['words']:.1%}" if "words" in row[name] else "" for name in NAMES]
        losses = [f"{row[name]['loss']:.3f}" for name in NAMES]
        rows.append([task, str(row["questions"]), *shares, *losses])
    text = (
        "Right: the text is the document's own; of pictures, the nearest of the alternatives' answers is. Chance: the "
        "most frequent text, or one of the alternatives. Words: F1 of the words against the true text. Loss: nats a "
        "token of the true answer."
    )
    return Section("Held-out documents", text, table=(heads, rows))


def _note(texts: bool) -> str:
    if texts:
        return (
            "The picture that was asked about, the question, the true answer, and both models' (best token each time)."
        )
    return "What was given, the true answer as the image tokenizer draws it, and both models' pictures, one draw each."


def _figures(found: Comparison, generator: Generator, number: int) -> tuple[str, list[Figure]]:
    """A row of the page: what was given, what is true, what each model answered."""
    question, given = found.questions[number], []
    text = " ".join(
        generator.text_tokenizer.decode(segment.tokens.tolist()).strip()
        for segment in question.document.segments
        if segment.kind != IMAGE and not segment.answer
    )
    for segment in question.document.segments:
        if segment.kind == IMAGE and not segment.answer:
            given.append(Figure(_drawn(generator, segment.tokens), ["given"]))
    if not question.picture:
        lines = [text, f"wanted: {wanted_text(generator, question)}"]
        lines += [f"{name}: {answers.texts[number]}" for name, answers in found.answers.items()]
        mark = "good" if found.answers["tuned"].right[number] else "bad"
        return "", [Figure(figure.picture, lines, mark) for figure in given]
    answer = next(segment for segment in question.prompt.answer if segment.kind == IMAGE)
    figures = [*given, Figure(_drawn(generator, answer.tokens), ["wanted"])]
    for name, answers in found.answers.items():
        codes = answers.codes[number]
        assert codes is not None
        figures.append(Figure(_drawn(generator, codes), [name], "good" if answers.right[number] else "bad"))
    return text, figures


def _drawn(generator: Generator, codes: np.ndarray) -> np.ndarray:
    pixels: np.ndarray = generator.image_tokenizer.decode(np.array(codes)[None]).numpy()[0]
    return pixels


def _rows(found: Comparison, generator: Generator) -> list[dict[str, Any]]:
    rows = []
    for number, question in enumerate(found.questions):
        row: dict[str, Any] = {"key": question.key, "task": question.task}
        if not question.picture:
            row["wanted"] = wanted_text(generator, question)
        for name, answers in found.answers.items():
            given = {} if question.picture else {"text": answers.texts[number]}
            row[name] = given | {"right": answers.right[number], "loss": answers.losses[number]}
        rows.append(row)
    return rows
