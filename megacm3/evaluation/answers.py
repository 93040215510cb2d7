"""What a model answers to the documents of a fine-tuning store, and how often it is right.

A text is right when it is the document's, letter case, white space and a last full stop aside. A picture is right when,
among the answers to the document's alternatives, the one nearest to it at 16 x 16 pixels is the document's own (all as
the image tokenizer draws them, so that its losses do not count). Alternatives are documents of the same task whose keys
differ only where a pattern matches, such as the same figure in another skin tone; where there is none, all of the task.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from megacm3.command import seed_from
from megacm3.data.documents import IMAGE, Document, Layout
from megacm3.data.store import Store
from megacm3.errors import ConfigError, DataError
from megacm3.evaluation.fidelity import nearest_pictures, shrink
from megacm3.evaluation.perplexity import batches_of, token_losses
from megacm3.inference.engine import Engine, Request
from megacm3.inference.modality import Modes
from megacm3.inference.sampling import Sampling
from megacm3.sft.prompts import Prompt, cut

if TYPE_CHECKING:
    from megacm3.inference.api import Generator


@dataclass(frozen=True)
class Question:
    """One document of the store, to be answered."""

    key: str
    task: str
    document: Document
    prompt: Prompt
    picture: bool
    """The answer is a picture."""
    alternatives: tuple[Document, ...] = ()
    """Of a picture: documents with other answers that it is told apart from, the own one first."""


@dataclass
class Answers:
    """What one model gave; a list has an entry a question."""

    texts: list[str] = field(default_factory=list)
    """Empty for pictures."""
    codes: list[np.ndarray | None] = field(default_factory=list)
    """int64 [codes], None for texts."""
    losses: list[float] = field(default_factory=list)
    """Mean loss of the true answer's tokens in nats."""
    right: list[bool] = field(default_factory=list)
    overlaps: list[float] = field(default_factory=list)
    """Of a text: F1 of its words against the true answer's; of a picture 1 or 0, as it is right."""


def choose_questions(store: Store, layout: Layout, count: int, alike: str = "", seed: int = 0) -> list[Question]:
    """Up to `count` documents of each task, drawn by `seed` and key, in the store's order of tasks.

    alike: what is struck from keys to find a document's alternatives; empty = all of the task are. Raises DataError for
    a store whose documents have no answers, ConfigError for an `alike` that is no regular expression.
    """
    try:
        pattern = re.compile(alike)
    except re.error as fault:
        raise ConfigError(f"--alike {alike}: {fault}; expected a regular expression") from fault
    table = store.metadata(["key", "task"]).to_pydict()
    by_task: dict[str, list[int]] = {}
    for doc_id, task in enumerate(table["task"]):
        by_task.setdefault(task or "", []).append(doc_id)
    chosen = []
    for task, doc_ids in by_task.items():
        keys = {doc_id: str(table["key"][doc_id]) for doc_id in doc_ids}
        drawn = sorted(doc_ids, key=lambda doc_id: seed_from("question", seed, keys[doc_id]))[:count]
        struck = {doc_id: pattern.sub("", key) if alike else "" for doc_id, key in keys.items()}
        for doc_id in sorted(drawn):
            document = store.document(doc_id)
            prompt = cut(document, layout)
            picture = prompt.answer[0].kind == IMAGE
            same = [i for i in doc_ids if struck[i] == struck[doc_id] and i != doc_id]
            same = same or [i for i in doc_ids if i != doc_id]
            others = _different([document, *(store.document(i) for i in same)]) if picture else []
            chosen.append(Question(keys[doc_id], task, document, prompt, picture, tuple(others)))
    if not chosen:
        raise DataError(f"{store.folder} is empty; expected held-out documents with answers")
    return chosen


def _answer_codes(document: Document) -> np.ndarray:
    return next(segment.tokens for segment in document.segments if segment.answer and segment.kind == IMAGE)


def _different(documents: Sequence[Document]) -> list[Document]:
    """The first of those with equal answers."""
    seen: dict[bytes, Document] = {}
    for document in documents:
        seen.setdefault(_answer_codes(document).tobytes(), document)
    return list(seen.values())


def chance(questions: Sequence[Question]) -> float:
    """The share that guessing gets right: one of the alternatives, or always the most frequent text."""
    pictures = [1 / len(question.alternatives) for question in questions if question.picture]
    texts = Counter(_plain_ids(question) for question in questions if not question.picture)
    return (sum(pictures) + (texts.most_common(1)[0][1] if texts else 0)) / len(questions)


def _plain_ids(question: Question) -> bytes:
    return question.prompt.answer[0].tokens.tobytes()


def answer_all(generator: "Generator", questions: Sequence[Question], layout: Layout, *, seed: int = 0) -> Answers:
    """The model's answers: texts by the best token each time, pictures drawn at temperature 0.3 and top-p 0.9."""
    found = Answers(losses=answer_losses(generator, [question.document for question in questions], layout))
    picture = Sampling(0.3, top_p=0.9)
    requests = []
    for question in questions:
        ids = tuple(question.prompt.tokens.tolist())
        mode = Modes.IMAGE if question.picture else Modes.INFILL if question.prompt.infill else Modes.TEXT
        seeded = seed_from("answer", seed, question.key)
        text = Sampling(0.0)
        requests.append(Request(ids, mode, seeded, None if question.picture else 48, image=picture, text=text))
    ids_of: list[list[int]] = [[] for _ in requests]
    for event in Engine(generator.decoder, generator.grammar, generator.context).run(requests):
        ids_of[event.request] += event.ids
    vocabulary = generator.vocabulary
    for question, drawn in zip(questions, ids_of, strict=True):
        codes = vocabulary.codes(np.asarray(drawn)) if question.picture else None
        found.codes.append(codes)
        found.texts.append("" if question.picture else generator.text_tokenizer.decode(drawn).strip())
    found.right = [_is_right(generator, *row) for row in zip(questions, found.texts, found.codes, strict=True)]
    for question, answer, right in zip(questions, found.texts, found.right, strict=True):
        overlap = float(right) if question.picture else word_overlap(answer, wanted_text(generator, question))
        found.overlaps.append(overlap)
    return found


def wanted_text(generator: "Generator", question: Question) -> str:
    """The true answer's text."""
    tokens = [int(i) for segment in question.prompt.answer if segment.kind != IMAGE for i in segment.tokens]
    return generator.text_tokenizer.decode(tokens).strip()


def plain(text: str) -> str:
    """A text for comparison."""
    return " ".join(text.casefold().split()).rstrip(".")


def word_overlap(text: str, wanted: str) -> float:
    """F1 of two texts' words, each word as often as it stands there; punctuation aside."""
    first, second = (Counter(re.findall(r"[\w-]+", plain(value))) for value in (text, wanted))
    shared = sum((first & second).values())
    return 2 * shared / max(1, sum(first.values()) + sum(second.values()))


def _is_right(generator: "Generator", question: Question, text: str, codes: np.ndarray | None) -> bool:
    if codes is None:
        return plain(text) == plain(wanted_text(generator, question))
    drawn = np.stack([codes, *(_answer_codes(document) for document in question.alternatives)])
    small = shrink(generator.image_tokenizer.decode(drawn).numpy())
    return int(nearest_pictures(small[:1], small[1:])[0]) == 0


def answer_losses(generator: "Generator", documents: Sequence[Document], layout: Layout) -> list[float]:
    """Mean loss in nats over each document's answer, given what stands before it."""
    assembled = [layout.assemble([document]) for document in documents]
    longest = max(len(tokens) for tokens, _ in assembled)
    if longest > generator.context:
        raise DataError(f"a document has {longest} tokens; the model's context is {generator.context}")
    flags = iter([answers for _, answers in assembled])
    losses: list[float] = []
    for batch in batches_of(tokens for tokens, _ in assembled):
        values, _ = token_losses(generator, batch)
        for row in values.split([len(tokens) - 1 for tokens in batch]):
            losses.append(float(row[torch.from_numpy(next(flags)[1:])].mean()))
    return losses
