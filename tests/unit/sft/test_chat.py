"""Conversations in Hugging Face's format: pictures in their places, answers marked, damage named."""

from typing import Any

import pytest

from megacm3.data.images import Reject
from megacm3.sft.chat import chat_parts
from megacm3.sft.tasks import load_tasks

TASKS = load_tasks()


def load(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise Reject("no_image", str(value))
    return value


def show(record: dict[str, Any], task: str = "safety", way: str = "chameleon") -> str:
    parts = chat_parts(TASKS[task], record, load, way)
    texts = [part.content if isinstance(part.content, str) else f"({part.content.decode()})" for part in parts]
    return "".join(f"[{text}]" if part.answer else text for text, part in zip(texts, parts, strict=True))


def said(*turns: Any, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)]} | more


IMAGE = {"type": "image"}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def test_blocks_take_the_pictures_in_order() -> None:
    record = said([IMAGE, text("and"), IMAGE, text("alike?")], [text("No.")], images=[b"1", b"2"])
    assert show(record) == "(1)and(2)alike?[No.]"
    # parquet fills the keys that a block does not have with null
    full = said([{"type": "image", "text": None, "index": 0}, {"type": "text", "text": "?"}], "A cat.", images=[b"1"])
    assert show(full, "visual-chat") == "(1)?[A cat.]"


def test_pictures_within_blocks() -> None:
    inside = [{"type": "image", "image": b"1"}, {"type": "image_url", "image_url": {"url": b"2"}}, text("?")]
    assert show(said(inside, "Yes.")) == "(1)(2)?[Yes.]"


def test_plain_texts_with_and_without_marks() -> None:
    assert show(said("What is <image> here?", "A cat.", images=[b"1"])) == "What is(1)here?[A cat.]"
    assert show(said("What is this?", "A cat.", images=[b"1"])) == "(1)What is this?[A cat.]"
    assert show(said("What is this?", "A cat.", image=b"1")) == "(1)What is this?[A cat.]"
    # Without pictures the mark is what the user wrote.
    assert show(said("What does <image> mean?", "A mark.")) == "What does <image> mean?[A mark.]"


def test_turns_and_roles() -> None:
    record = said("one", "two", "three", "four")
    record["messages"].insert(0, {"role": "system", "content": "Be brief."})
    assert show(record) == "Be brief.\none[two]three[four]"
    # Without a token between turns (CM3Leon's way) a line is.
    assert show(record, way="cm3leon") == "Be brief.\none\n[two]\nthree\n[four]"


def test_prompt_and_completion() -> None:
    assert show({"prompt": "one", "completion": "two"}, "text") == "one[two]"
    drawn = {"prompt": "draw a cat", "completion": [{"role": "assistant", "content": [IMAGE]}], "images": [b"1"]}
    assert show(drawn, "image-generation") == "draw a cat[(1)]"
    both = {"prompt": "tell", "completion": "Here: <image> so.", "images": [b"1"]}
    assert show(both, "interleaved-generation") == "tell[Here:][(1)][so.]"


@pytest.mark.parametrize(
    ("record", "task", "message"),
    [
        (said("a"), "text", "no_answer"),
        (said("a", "b", "c"), "text", "no_answer"),
        (said("a", "  "), "text", "no_answer"),
        (said(" ", "b"), "text", "no_prompt"),
        (said("a", "b", images=[b"1"]), "text", "wrong_kind: task text expects none pictures"),
        (said("a", "b"), "visual-chat", "wrong_kind: task visual-chat expects some pictures"),
        (said("a", "b"), "image-generation", "wrong_kind: task image-generation expects picture in its answers"),
        (said("a", [IMAGE], images=[b"1"]), "interleaved-generation", "wrong_kind: .* expects both .* found picture"),
        (said([IMAGE, text("a")], "b"), "safety", "unequal_lists: 1 places for pictures and 0"),
        (said([IMAGE, text("a")], "b", images=[b"1", b"2"]), "safety", "unequal_lists: 1 places for pictures and 2"),
        (said([{"type": "video"}], "b"), "safety", "wrong_kind: a block of type 'video'"),
        (said(3, "b"), "safety", "wrong_kind: content is a int"),
        ({"messages": [{"role": "judge", "content": "a"}]}, "safety", "wrong_kind: role 'judge'"),
        ({"messages": "hello"}, "safety", "wrong_kind: messages is no list"),
        ({"text": "hello"}, "safety", "missing_field"),
        (said([{"type": "image", "image": "x.png"}], "b"), "safety", "no_image"),
    ],
)
def test_damage_is_named(record, task, message) -> None:
    with pytest.raises(Reject, match=message):
        show(record, task)
