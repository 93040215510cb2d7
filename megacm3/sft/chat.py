"""Conversations: Hugging Face's chat format with pictures becomes the parts of a document.

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cat."}], "images": [PICTURE]}

or TRL's `prompt` and `completion`, each a text or a list of messages. A picture stands in its content block, or comes
in order from `images`; `<image>` in a plain text marks its place when the marks are as many as the pictures that are
still to be placed, and is text otherwise; with no mark at all the pictures open the first message of the user, as TRL
has it. What the assistant says is the answer.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megacm3.data.images import Reject
from megacm3.data.sources import clean_text
from megacm3.sft.render import Part
from megacm3.sft.tasks import Task

ROLES = {"system": False, "developer": False, "user": False, "tool": False, "assistant": True}
"""Role -> whether it answers."""
MARK = "<image>"
Load = Callable[[Any], bytes]
"""Bytes of a picture from what a record holds for it; raises Reject."""


def is_chat(record: Mapping[str, Any]) -> bool:
    """Whether a record is a conversation."""
    return record.get("messages") is not None or (record.get("prompt") is not None and "completion" in record)


def chat_parts(task: Task, record: Mapping[str, Any], load: Load, way: str) -> list[Part]:
    """The parts of a conversation, in its own order.

    Raises Reject: wrong_kind, no_answer, unequal_lists, missing_field, and what texts and pictures are rejected for.
    """
    turns = [_turn(message) for message in _messages(record)]
    images = record.get("images", record.get("image"))
    pictures = list(images) if isinstance(images, list) else [images] if images is not None else []
    blocks = _placed(turns, pictures)
    parts = [Part(load(content[0]) if isinstance(content, tuple) else content, answer) for answer, content in blocks]
    joined = _joined(parts, way)
    _check(task, joined, answered=bool(turns) and turns[-1][0])
    return joined


def _messages(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if record.get("messages") is not None:
        messages = record["messages"]
    elif is_chat(record):
        messages = []
        for name, role in (("prompt", "user"), ("completion", "assistant")):
            value = record[name]
            messages += [{"role": role, "content": value}] if isinstance(value, str) else value or []
    else:
        raise Reject("missing_field", f"expected messages, or prompt and completion; has {', '.join(record)}")
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise Reject("wrong_kind", "messages is no list of {role, content}")
    return messages


def _turn(message: Mapping[str, Any]) -> tuple[bool, list[Any]]:
    """(answers, blocks) of a message: a str for text, (value,) for a picture, None for one of the record's list."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise Reject("wrong_kind", f"role {role!r}; expected one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return ROLES[role], [content]
    if not isinstance(content, list):
        raise Reject("wrong_kind", f"content is a {type(content).__name__}; expected a text or a list of blocks")
    return ROLES[role], [_block(block) for block in content]


def _block(block: Any) -> Any:
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind == "text":
        # A tuple of its own kind would be one more; a list marks a text that is text to the last letter.
        return [str(block.get("text") or "")]
    if kind == "image_url":
        link = block.get("image_url")
        return (link.get("url") if isinstance(link, Mapping) else link,)
    if kind == "image":
        value = next((block[name] for name in ("image", "path", "url") if block.get(name) is not None), None)
        return None if value is None else (value,)
    raise Reject("wrong_kind", f"a block of type {kind!r}; expected text, image or image_url")


def _placed(turns: list[tuple[bool, list[Any]]], pictures: list[Any]) -> Iterator[tuple[bool, Any]]:
    """(answers, text or (picture,)) in order, every picture of the list in its place."""
    free = sum(block is None for _, blocks in turns for block in blocks)
    marks = sum(block.count(MARK) for _, blocks in turns for block in blocks if isinstance(block, str))
    marked = bool(marks) and marks + free == len(pictures)
    first = not free and not marked
    if not first and free + marks * marked != len(pictures):
        raise Reject("unequal_lists", f"{free + marks} places for pictures and {len(pictures)} pictures")
    rest = iter(pictures)
    for answer, blocks in turns:
        if first and not answer and pictures:
            yield from ((False, (picture,)) for picture in rest)
            first = False
        for block in blocks:
            if block is None:
                yield answer, (next(rest),)
            elif isinstance(block, list):
                yield answer, block[0]
            elif isinstance(block, str) and marked:
                for i, text in enumerate(block.split(MARK)):
                    if i:
                        yield answer, (next(rest),)
                    yield answer, text
            else:
                yield answer, block


def _joined(parts: list[Part], way: str) -> list[Part]:
    """Texts cleaned, empty ones left out, neighbours of one side joined; a line between sides where no mark stands."""
    joined: list[Part] = []
    for part in parts:
        content, before = part.content, joined[-1] if joined else None
        if isinstance(content, bytes) or not content.strip():
            joined += [part] if isinstance(content, bytes) else []
            continue
        content = clean_text(content)
        if before is not None and isinstance(before.content, str) and before.answer == part.answer:
            joined[-1] = Part(f"{before.content}\n{content}", part.answer)
            continue
        if before is not None and isinstance(before.content, str) and way != "chameleon":
            if part.answer:
                joined[-1] = Part(before.content + "\n", False)
            else:
                content = "\n" + content
        joined.append(Part(content, part.answer))
    return joined


def _check(task: Task, parts: list[Part], answered: bool) -> None:
    answers = {"picture" if isinstance(part.content, bytes) else "text" for part in parts if part.answer}
    prompt = [part for part in parts if not part.answer]
    if not answered or not answers:
        raise Reject("no_answer", "the conversation does not end with an answer: its labels would all be masked")
    if not prompt:
        raise Reject("no_prompt", "the conversation holds nothing but an answer")
    pictures = any(isinstance(part.content, bytes) for part in prompt)
    if task.prompt_pictures != "any" and pictures != (task.prompt_pictures == "some"):
        raise Reject("wrong_kind", f"task {task.name} expects {task.prompt_pictures} pictures in its prompts")
    expected = task.answers[0] if task.answers else "any"
    wanted = {"both": {"text", "picture"}, "any": answers}.get(expected, {expected})
    if answers != wanted:
        found = " and ".join(sorted(answers))
        raise Reject("wrong_kind", f"task {task.name} expects {expected} in its answers; found {found}")
