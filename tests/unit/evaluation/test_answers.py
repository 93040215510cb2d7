"""Answers to a fine-tuning store: what is asked, what counts as right, losses, and the page that shows two models."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megacm3.data.documents import ANSWER, IMAGE, TEXT, Document, Layout, Segment
from megacm3.data.parts import write_store
from megacm3.data.store import Store, StoreShape
from megacm3.errors import ConfigError, DataError
from megacm3.evaluation import answers
from megacm3.evaluation.answer_files import read_answers
from megacm3.evaluation.answers import answer_all, answer_losses, chance, choose_questions, plain, word_overlap
from megacm3.evaluation.tuning_report import compare_models, write_tuning_report
from tests.helpers import tiny_models
from tests.helpers.tools import run_tool

CODES = tiny_models.GRID**2


@pytest.fixture(scope="module")
def store(hf_folder, tmp_path_factory) -> Path:
    """Questions about pictures and edits in two tones of three figures, with the export's tokenizers."""
    from megacm3.tokenizers.text import TextTokenizer

    tokenizer = TextTokenizer.load(hf_folder / "text_tokenizer")
    rng = np.random.default_rng(0)
    pictures = {(f, tone): rng.integers(0, tiny_models.CODEBOOK, CODES) for f in "abc" for tone in "12"}

    def documents():
        for (figure, tone), codes in pictures.items():
            asked = np.array(tokenizer.encode("a red"))
            segments = [(IMAGE, codes), (TEXT, asked), (TEXT | ANSWER, np.array(tokenizer.encode(" cat")))]
            yield segments, {"key": f"{figure}-{tone}:question", "task": "question"}
            other = pictures[figure, "21"[int(tone) - 1]]
            edit = [(IMAGE, other), (TEXT, asked), (IMAGE | ANSWER, codes)]
            yield edit, {"key": f"{figure}-{tone}:edit", "task": "edit"}

    folder = tmp_path_factory.mktemp("answers") / "store"
    inputs = {
        role: json.loads((hf_folder / role / "manifest.json").read_text())["fingerprint"]
        for role in ("text_tokenizer", "image_tokenizer")
    }
    shape = StoreShape(tokenizer.size, tiny_models.CODEBOOK, CODES, image_size=tiny_models.PIXELS)
    write_store(folder, documents(), shape, inputs, documents_per_part=5)
    return folder


@pytest.fixture(scope="module")
def layout(generator) -> Layout:
    return Layout(generator.vocabulary, turns=True)


def test_texts_are_compared_without_case_spaces_and_a_last_stop() -> None:
    assert plain(" A  Red\tcat. ") == plain("a red cat") != plain("a red cats")
    assert word_overlap("A cat, red cat.", "red cat") == pytest.approx(2 * 2 / 6)
    assert word_overlap("", "red") == 0.0 == word_overlap("dog", "red") and word_overlap("Red!", "red") == 1.0


def test_questions_are_drawn_by_task_and_alternatives_share_the_rest_of_the_key(store, layout) -> None:
    opened = Store.open(store)
    every = choose_questions(opened, layout, 100, r"-[12]:")
    assert [q.task for q in every].count("edit") == 6 == [q.task for q in every].count("question")
    for question in every:
        if question.picture:
            assert question.alternatives[0].doc_id == question.document.doc_id and len(question.alternatives) == 2
            assert np.array_equal(question.alternatives[0].segments[-1].tokens, question.prompt.answer[0].tokens)
        else:
            assert question.alternatives == ()
    with pytest.raises(ConfigError, match=r"--alike \(: .*expected a regular expression"):
        choose_questions(opened, layout, 100, "(")
    apart = choose_questions(opened, layout, 100)
    assert {len(question.alternatives) for question in apart if question.picture} == {6}
    some, more = (choose_questions(opened, layout, count, seed=3) for count in (2, 3))
    assert {question.key for question in some} < {question.key for question in more}
    assert chance([question for question in every if question.picture]) == 1 / 2
    assert chance([question for question in every if not question.picture]) == 1.0


def test_what_is_right(generator, store, layout, monkeypatch) -> None:
    """The true answers given back are right, and those of an alternative wrong."""
    questions = choose_questions(Store.open(store), layout, 100, r"-[12]:")
    for question in questions:
        if question.picture:
            mine, other = (document.segments[-1].tokens for document in question.alternatives)
            assert answers._is_right(generator, question, "", mine)
            assert not answers._is_right(generator, question, "", other)
        else:
            assert answers._is_right(generator, question, "Cat.", None)
            assert not answers._is_right(generator, question, "cats", None)


def test_losses_are_the_class_s_own(generator, hf_folder, store, layout) -> None:
    """Against transformers' model, one document at a time, over the answer's targets alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32).eval()
    opened = Store.open(store)
    documents = [opened.document(i) for i in range(len(opened))]
    for document, found in zip(documents, answer_losses(generator, documents, layout), strict=True):
        tokens, flags = layout.assemble([document])
        ids = torch.from_numpy(tokens)
        with torch.no_grad():
            logits = model(input_ids=ids[None, :-1]).logits[0, :, : generator.vocabulary.size]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        assert found == pytest.approx(float(losses[torch.from_numpy(flags[1:])].mean()), rel=1e-4)


def test_answers_do_not_depend_on_what_is_asked_beside_them(generator, store, layout) -> None:
    questions = choose_questions(Store.open(store), layout, 100, r"-[12]:")
    every, few = answer_all(generator, questions, layout), answer_all(generator, questions[3:8], layout)
    assert few.texts == every.texts[3:8] and few.right == every.right[3:8]
    assert all(np.array_equal(a, b) for a, b in zip(few.codes, every.codes[3:8], strict=True) if a is not None)
    assert few.losses == pytest.approx(every.losses[3:8], rel=1e-4)
    assert {len(codes) for codes in every.codes if codes is not None} == {CODES}


def test_two_models_on_one_page(hf_folder, store, tmp_path, capsys) -> None:
    """The tool: the same model twice gives the same figures; the page needs no network and holds every picture."""
    options = ["--store", store, "--count", 3, "--alike=-[12]:", "--output", tmp_path / "out"]
    assert run_tool("compare_models", "--base", hf_folder, "--tuned", hf_folder, *options) == (0, "")
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "out/answers.json").read_text())
    for task in ("question", "edit"):
        row = found["tasks"][task]
        assert row["questions"] == 3 and row["base"] == row["tuned"] and 0 <= row["base"]["right"] <= 1
        assert re.search(rf"{task}: right (\S+)% -> \1%", told)
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image/png;base64,") >= 3 + 3 * 4 and not re.search(r'(src|href)="(?!data:)', page)
    assert (tmp_path / "out/samples.png").stat().st_size > 1000
    one, other = (read_answers(tmp_path / "out/people" / f"{name}.jsonl") for name in ("base", "tuned"))
    assert len(one) == 6 and [row.key for row in one] == [row.key for row in other]
    assert all(len(row.images) == (row.task == "edit") and row.prompt for row in one)


def test_models_and_stores_that_do_not_belong_together_are_refused(hf_folder, store, tmp_path) -> None:
    other = shutil.copytree(hf_folder, tmp_path / "other")
    sidecar = json.loads((other / "megacm3.json").read_text())
    sidecar["vocabulary"]["sentinels"] = 4
    (other / "megacm3.json").write_text(json.dumps(sidecar))
    with pytest.raises(DataError, match="different vocabularies"):
        compare_models(str(other), str(hf_folder), str(store), count=1)
    shape = StoreShape(320, tiny_models.CODEBOOK, CODES, image_size=tiny_models.PIXELS)
    plain_documents = [([(TEXT, np.array([5])), (IMAGE, np.zeros(CODES, np.int64))], {"key": "a"})]
    write_store(tmp_path / "plain", iter(plain_documents), shape, None)
    with pytest.raises(DataError, match="has no answer"):
        compare_models(str(hf_folder), str(hf_folder), str(tmp_path / "plain"), count=1)


def test_a_document_longer_than_the_context_is_refused(generator, layout) -> None:
    long = Segment(TEXT, np.full(generator.context, 5), answer=True)
    with pytest.raises(DataError, match="context"):
        answer_losses(generator, [Document(0, (Segment(TEXT, np.array([5])), long))], layout)


def test_the_page_marks_right_and_wrong(hf_folder, store, tmp_path) -> None:
    found, generator = compare_models(str(hf_folder), str(hf_folder), str(store), count=2, alike=r"-[12]:")
    for name in ("base", "tuned"):
        found.answers[name].right = [True, False] * (len(found.questions) // 2)
    write_tuning_report(found, generator, tmp_path, shown=2)
    page = (tmp_path / "report.html").read_text()
    assert 'class="good"' in page and 'class="bad"' in page and "50.0%" in page
