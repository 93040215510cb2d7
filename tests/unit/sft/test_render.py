"""Records through templates: what is refused, what stays text, where boxes go."""

import pytest

from megacm3.data.images import Reject
from megacm3.sft.render import choose_template, place_box, render, usable_templates
from megacm3.sft.tasks import load_tasks
from tests.unit.sft.helpers import picture

TASKS = load_tasks()


def rejected(call, *arguments) -> str:
    with pytest.raises(Reject) as caught:
        call(*arguments)
    return f"{caught.value.reason}: {caught.value.detail}"


def test_a_field_that_a_record_lacks_is_named() -> None:
    fields = {"image": b"p", "question": "What?", "answer": None}
    assert rejected(choose_template, TASKS["vqav2"], fields, "k").startswith("missing_field: task vqav2 needs answer")
    assert "needs image2" in rejected(usable_templates, TASKS["instructpix2pix"], {"image1": b"p", "instruction": "x"})


def test_templates_of_an_absent_optional_field_are_passed_over() -> None:
    fields = {"image": b"p", "question": "?", "context": "N/A", "choices": ["a"], "answer": "a"}
    assert usable_templates(TASKS["scienceqa"], fields) == [0]
    assert usable_templates(TASKS["scienceqa"], fields | {"explanation": "so"}) == [0, 1]


def test_templates_are_drawn_by_the_record_s_key_alone() -> None:
    fields = {"image": b"p", "question": "What?", "answer": "a"}
    drawn = [choose_template(TASKS["vqav2"], fields, str(n)) for n in range(600)]
    assert drawn == [choose_template(TASKS["vqav2"], fields, str(n)) for n in range(600)]
    assert all(150 < drawn.count(number) < 250 for number in range(3))
    assert drawn != [choose_template(TASKS["vqav2"], fields, str(n), seed=1) for n in range(600)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": "words", "question": "?", "answer": "a"}, "wrong_kind: field image of task vqav2 is a str"),
        ({"image": b"p", "question": b"p", "answer": "a"}, "wrong_kind: field question of task vqav2 is a bytes"),
        ({"image": b"p", "question": {}, "answer": "a"}, "wrong_kind: field question"),
        ({"image": b"p", "question": "?", "answer": True}, "wrong_kind: field answer"),
        ({"image": b"p", "question": "?", "answer": "  "}, "empty_text"),
        ({"image": b"p", "question": "a\0b", "answer": "a"}, "nul_in_text"),
        ({"image": b"p", "question": "\udc00", "answer": "a"}, "invalid_utf8"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(fields, message) -> None:
    assert rejected(render, TASKS["vqav2"], 0, fields, "cm3leon").startswith(message)


def test_marks_and_braces_in_a_value_stay_text() -> None:
    fields = {"image": b"p", "question": "{image} <break> {answer} </s>", "answer": "<end-of-turn> {question}"}
    parts = render(TASKS["vqav2"], 0, fields, "chameleon")
    assert [part.content for part in parts] == [
        b"p",
        "Question: {image} <break> {answer} </s> Answer:",
        "<end-of-turn> {question}",
    ]


def test_numbers_are_text() -> None:
    fields = {"image": b"p", "question": "How many?", "answer": 3}
    assert render(TASKS["vqav2"], 1, fields, "cm3leon")[1].content == "3"


def test_boxes_follow_the_centre_crop() -> None:
    # 512 x 256: scaled by 1, 128 pixels fall away on either side.
    assert place_box([128, 0, 256, 128], (512, 256)) == (0, 0, 128, 128)
    assert place_box([100, 10, 300, 300], (512, 256)) == (0, 10, 172, 255)
    assert place_box([0, 0, 120, 256], (512, 256)) is None
    # 640 x 480 as COCO has it: scaled by 256/480.
    assert place_box([80, 0, 560, 480], (640, 480)) == (0, 0, 255, 255)
    assert rejected(place_box, [5, 5, 5, 9], (64, 64)).startswith("bad_box")
    assert rejected(place_box, [5, 5, 9], (64, 64)).startswith("bad_box")
    for far in (float("inf"), float("nan")):
        assert rejected(place_box, [5, 5, far, 9], (64, 64)).startswith("bad_box")


def test_objects_at_their_locations() -> None:
    objects = [{"name": "bottle", "box": [32, 0, 64, 32]}, {"name": "far left", "box": [0, 0, 20, 64]}]
    objects.append({"name": "sink", "box": [40, 16, 90, 60]})
    fields = {"image": picture(1, (128, 64)), "caption": "a room", "objects": objects}
    text = render(TASKS["detection"], 0, fields, "cm3leon")[0].content
    # Scaled by 4, moved by 128: the second object lies in what the crop takes away.
    assert text == (
        "Generate high quality image of a room with segmentations "
        "bottle at location (0, 0) -> (128, 128), sink at location (32, 64) -> (232, 240)"
    )
    numbered = fields | {"objects": [{"name": 7, "box": [32, 0, 64, 32]}]}  # a category's number
    assert render(TASKS["detection"], 0, numbered, "cm3leon")[0].content.endswith("7 at location (0, 0) -> (128, 128)")
    gone = fields | {"objects": objects[1:2]}
    assert rejected(render, TASKS["detection"], 0, gone, "cm3leon").startswith("bad_box: no object lies")
    assert rejected(render, TASKS["detection"], 0, fields | {"objects": [{"box": 3}]}, "cm3leon").startswith("bad_box")
    assert rejected(render, TASKS["detection"], 0, fields | {"objects": "x"}, "cm3leon").startswith("wrong_kind")
