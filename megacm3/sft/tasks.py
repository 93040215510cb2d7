"""The table of tasks (tasks.yaml), and templates taken apart into literals, fields and breaks."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megacm3.errors import ConfigError

CATEGORIES = ("text", "code", "visual chat", "image generation", "interleaved generation", "safety")
"""Chameleon's table of fine-tuning data (2405.09818, table 3)."""
WAYS = ("cm3leon", "image-first", "chameleon")
"""cm3leon: the templates' order, a text answer before its picture, to be filled in. image-first: pictures of the
question, its text, the answer. chameleon: the same, the prompt's pictures bordered, no space before an answer."""
MIXED = "mixed"
"""Name of a set whose records name their tasks."""
BREAK = "<break>"
_FIELD = re.compile(r"\{(\w+)\}")
_CHAT = {"prompt_pictures": ("none", "some", "any"), "answers": ("text", "picture", "both", "any")}


@dataclass(frozen=True)
class Item:
    """One element of a template: literal text (`field` empty) or a field."""

    text: str
    field: str = ""


@dataclass(frozen=True)
class Task:
    """One row of the table; the fields are explained at the head of tasks.yaml."""

    name: str
    templates: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    """Fields of the answer; of a conversation one word: text, picture, both or any."""
    optional: tuple[str, ...] = ()
    category: str = ""
    examples: int = 0
    chat: bool = False
    prompt_pictures: str = "any"

    def to_json(self) -> dict[str, Any]:
        """As in the YAML file; what a store's manifest keeps."""
        kept = {key: value for key, value in dataclasses.asdict(self).items() if key != "name"}
        kept |= {key: list(value) for key, value in kept.items() if isinstance(value, tuple)}
        return kept | ({"answers": self.answers[0]} if self.chat else {})

    def fields(self, template: int) -> set[str]:
        """Names of the fields that a template uses."""
        return {item.field for segment in parse(self.templates[template]) for item in segment if item.field}


@lru_cache(maxsize=256)
def parse(template: str) -> tuple[tuple[Item, ...], ...]:
    """The segments of a template (what stands between breaks), each a run of literals and fields."""
    segments = []
    for part in template.split(BREAK):
        items, end, part = [], 0, part.strip(" ")
        for match in _FIELD.finditer(part):
            if match.start() > end:
                items.append(Item(part[end : match.start()]))
            items.append(Item("", match[1]))
            end = match.end()
        if end < len(part):
            items.append(Item(part[end:]))
        segments.append(tuple(items))
    return tuple(segments)


def make_task(name: str, entry: Mapping[str, Any]) -> Task:
    """A task from its entry of a YAML file. Raises ConfigError for whatever is wrong with it."""
    known = {field.name for field in dataclasses.fields(Task)} - {"name"}
    if not isinstance(entry, Mapping) or set(entry) - known:
        unknown = ", ".join(sorted(set(entry) - known)) if isinstance(entry, Mapping) else type(entry).__name__
        raise ConfigError(f"task {name}: found {unknown}; expected some of {', '.join(sorted(known))}")
    values: dict[str, Any] = dict(entry)
    for key in ("templates", "pictures", "answers", "optional"):
        value = values.get(key, ())
        if not isinstance(value, str | list | tuple):
            raise ConfigError(f"task {name}: {key} is {value!r}; expected a text or a list of texts")
        values[key] = (value,) if isinstance(value, str) else tuple(str(item) for item in value)
    task = Task(name, **values)
    if task.category and task.category not in CATEGORIES:
        raise ConfigError(f"task {name}: category {task.category}; expected one of {', '.join(CATEGORIES)}")
    if task.chat:
        _check_chat(task)
    else:
        _check_templates(task)
    return task


def _check_chat(task: Task) -> None:
    found = {"prompt_pictures": task.prompt_pictures, "answers": " ".join(task.answers) or "any"}
    for key, choices in _CHAT.items():
        if found[key] not in choices:
            raise ConfigError(f"task {task.name}: {key} = {found[key]}; expected one of {', '.join(choices)}")


def _check_templates(task: Task) -> None:
    if not task.templates or not task.answers:
        raise ConfigError(f"task {task.name} lacks templates or answers; without an answer every label would be masked")
    for number, template in enumerate(task.templates):
        if not task.fields(number) & set(task.answers):
            raise ConfigError(
                f"task {task.name}: template {template!r} has none of the answers {', '.join(task.answers)}; "
                "every label would be masked"
            )
        for segment in parse(template):
            if not segment:
                raise ConfigError(f"task {task.name}: template {template!r} has nothing beside a {BREAK}")
            if len(segment) > 1 and any(item.field in task.pictures for item in segment):
                raise ConfigError(f"task {task.name}: {template!r}: a picture stands alone between {BREAK} marks")
    unused = {*task.pictures, *task.answers} - set().union(*(task.fields(n) for n in range(len(task.templates))))
    if unused:
        raise ConfigError(f"task {task.name}: no template has the field {', '.join(sorted(unused))}")


def load_tasks(path: str | Path = "") -> dict[str, Task]:
    """The tasks of the table, and those of a YAML file of the same form, which may replace some.

    Raises ConfigError when the file cannot be read or a task is wrong.
    """
    import yaml

    tasks: dict[str, Task] = {}
    for file in (Path(__file__).with_name("tasks.yaml"), *([Path(path)] if path else [])):
        try:
            entries = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as fault:
            raise ConfigError(f"--sft-tasks {file} cannot be read: {' '.join(str(fault).split())}") from fault
        if not isinstance(entries, dict):
            raise ConfigError(f"--sft-tasks {file} holds a {type(entries).__name__}; expected tasks by name")
        tasks |= {str(name): make_task(str(name), entry) for name, entry in entries.items()}
    return tasks


def choose_tasks(names: str, path: str | Path = "") -> dict[str, Task]:
    """The task called `names`; for `mixed` all of the file `path`, or of the table without one.

    Raises ConfigError for an unknown name, with the nearest ones.
    """
    import difflib

    tasks = load_tasks(path)
    if names == MIXED:
        own: Iterable[str] = load_names(path) if path else tasks
        return {name: tasks[name] for name in own}
    if names not in tasks:
        near = difflib.get_close_matches(names, [*tasks, MIXED], n=3) or [*tasks, MIXED]
        raise ConfigError(f"--sft {names} is no task; did you mean {', '.join(near)}? --sft-tasks adds your own")
    return {names: tasks[names]}


def load_names(path: str | Path) -> list[str]:
    """Names of the tasks in a YAML file."""
    import yaml

    return [str(name) for name in yaml.safe_load(Path(path).read_text(encoding="utf-8"))]
