"""The table of tasks: complete, well-formed, and refused where it is not."""

from pathlib import Path

import pytest

from megacm3.errors import ConfigError
from megacm3.sft.render import render
from megacm3.sft.tasks import CATEGORIES, WAYS, choose_tasks, load_tasks, make_task

PAPER = {
    "instructpix2pix": 1, "ocr": 1, "detection": 1, "edge": 1, "segmentation": 1, "hed": 1, "pose": 1, "depth": 1,
    "normal": 1, "scribble": 1, "coco-captions": 2, "flickr30k": 2, "image-paragraph": 3, "localized-narratives": 3,
    "vqav2": 3, "vizwiz": 3, "okvqa": 3, "scienceqa": 2,
}  # fmt: skip
"""Rows of CM3Leon's table 5 and the number of templates in each."""


def value(task, name):
    if name in task.pictures:
        return name.encode()
    return f"<{name}>"


def test_every_row_of_the_paper_s_table_is_there() -> None:
    tasks = load_tasks()
    assert {name: len(tasks[name].templates) for name in PAPER} == PAPER
    chats = [task for task in tasks.values() if task.chat]
    assert {task.category for task in chats} == set(CATEGORIES) and len(chats) == len(CATEGORIES)
    assert sum(tasks[name].examples for name in PAPER) == 11_406_000


def texts(parts) -> str:
    return "".join("".join(part.content for part in parts if isinstance(part.content, str)).split())


@pytest.mark.parametrize("name", [name for name in PAPER if name != "detection"])
def test_every_template_renders_in_every_way(name: str) -> None:
    task = load_tasks()[name]
    for number in range(len(task.templates)):
        fields = {field: value(task, field) for field in task.fields(number)}
        whole = render(task, number, fields, "cm3leon")
        for way in WAYS:
            parts = render(task, number, fields, way)
            pictures = {part.content for part in parts if isinstance(part.content, bytes)}
            assert pictures == {field.encode() for field in task.pictures}
            assert all(str(v) in texts(parts) for field, v in fields.items() if field not in task.pictures)
            assert "".join(texts([p for p in parts if p.answer])) == texts([p for p in whole if p.answer])
            if way != "cm3leon":
                # Nothing follows the answer, and all that was left away is a full stop.
                assert parts[-1].answer and texts(whole) in (texts(parts), texts(parts) + ".")


def test_the_text_stands_before_the_picture_and_the_answer_is_marked() -> None:
    task = load_tasks()["vqav2"]
    fields = {"image": b"p", "question": "What is it?", "answer": "a cat"}
    parts = [[(p.content, p.answer) for p in render(task, 0, fields, way)] for way in WAYS]
    assert parts[0] == [("Question: What is it? Answer:", False), (" a cat", True), (".", False), (b"p", False)]
    assert parts[1] == [(b"p", False), ("Question: What is it? Answer:", False), (" a cat", True)]
    assert parts[2] == [(b"p", False), ("Question: What is it? Answer:", False), ("a cat", True)]


def test_what_stands_between_two_answers_is_part_of_the_answer() -> None:
    task = load_tasks()["scienceqa"]
    fields = {"image": b"p", "question": "Where?", "context": "N/A", "choices": ["west", "east"]}
    fields |= {"explanation": "The sun rises there.", "answer": "east"}
    answers = [p.content for p in render(task, 1, fields, "cm3leon") if p.answer]
    assert answers == [" The sun rises there. So the answer is east"]
    prompt = render(task, 0, fields, "cm3leon")[0].content
    assert prompt == "Question: Where?\nContext: N/A\nOptions: (A) west (B) east\nAnswer:"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"templates": ["{a}"], "answering": ["a"]}, "found answering"),
        ({"templates": ["{a} <break> {image}"], "pictures": ["image"]}, "every label would be masked"),
        ({"templates": ["{a} <break> {image}"], "answers": ["b"]}, "none of the answers b"),
        ({"templates": ["see {image} {a}"], "pictures": ["image"], "answers": ["a"]}, "stands alone"),
        ({"templates": ["{a} <break> "], "answers": ["a"]}, "nothing beside"),
        ({"templates": ["{a}"], "answers": ["a"], "pictures": ["image"]}, "no template has the field image"),
        ({"templates": ["{a}"], "answers": ["a"], "category": "poems"}, "category poems"),
        ({"chat": True, "answers": "songs"}, "answers = songs"),
        (["{a}"], "found list"),
        ({"templates": 5, "answers": ["a"]}, "templates is 5; expected a text or a list"),
        ({"templates": ["{a}"], "answers": None}, "answers is None"),
    ],
)
def test_wrong_tasks_are_refused(entry, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task("mine", entry)


def test_a_file_adds_tasks_and_names_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text('mine:\n  templates: ["{a} is {b}"]\n  answers: [b]\n')
    assert list(choose_tasks("mixed", file)) == ["mine"]
    assert make_task("mine", choose_tasks("mine", file)["mine"].to_json()) == choose_tasks("mine", file)["mine"]
    assert "vqav2" in choose_tasks("mixed")
    with pytest.raises(ConfigError, match="did you mean vqav2"):
        choose_tasks("vqav")
    file.write_text("- a\n")
    with pytest.raises(ConfigError, match="holds a list"):
        choose_tasks("mine", file)
    file.write_text("a: [\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        choose_tasks("mine", file)
    with pytest.raises(ConfigError, match="cannot be read"):
        choose_tasks("mine", tmp_path / "nowhere.yaml")
