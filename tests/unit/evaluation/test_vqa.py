"""VQAv2's rule against values worked out by hand."""

import json

import pytest

from megacm3.errors import DataError
from megacm3.evaluation.vqa import accuracy, normalize, read_people


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes.", "yes"),
        ("  The red\tbus\n", "red bus"),
        ("two", "2"),
        ("none", "0"),
        ("a dog, a cat", "dog cat"),
        ("black/white", "black white"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("dont know", "don't know"),
        ("id", "id"),
        ("t-shirt", "t shirt"),
        # As the released evaluation does it: a full stop goes unless a digit follows,
        ("1. yes", "1 yes"),
        ("u.s. 3.a .5", "us 3a .5"),
        # and a mark is judged by the answer as it was given, not by what other marks left of it.
        ("a-b;-c", "b c"),
    ],
)
def test_answers_are_compared_without_their_clothes(answer, expected):
    assert normalize(answer) == expected


def test_accuracy_by_hand():
    ten = ["red"] * 2 + ["blue"] * 8
    # Two said red: leaving one of these out leaves 1 match (1/3), leaving another out leaves 2 (2/3).
    assert accuracy("Red.", ten) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert accuracy("blue", ten) == 1.0
    assert accuracy("green", ten) == 0.0
    # Three said so: 2 others match when one of them is left out, 3 else.
    assert accuracy("x", ["x"] * 3 + ["y"] * 7) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert accuracy("the dog", ["dog"]) == 1.0
    with pytest.raises(DataError, match="no answers"):
        accuracy("x", [])


def test_annotations_of_the_releases(tmp_path):
    answers = [{"answer": word} for word in ("yes", "no")]
    vqa, vizwiz, questions = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "q.json"
    vqa.write_text(json.dumps({"annotations": [{"question_id": 7, "image_id": 1, "answers": answers}]}))
    vizwiz.write_text(json.dumps([{"image": "x.jpg", "question": "?", "answers": answers}]))
    questions.write_text(json.dumps({"questions": [{"question_id": 7}]}))
    assert read_people(vqa) == {"7": ["yes", "no"]} and read_people(vizwiz) == {"x.jpg": ["yes", "no"]}
    assert read_people(questions) == {}
    for text in ("{", '{"other": 1}', "[1]"):
        vqa.write_text(text)
        with pytest.raises(DataError, match="expected annotations of VQAv2"):
            read_people(vqa)
