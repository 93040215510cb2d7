"""Records of tasks, from any table or a release's own files, to samples with their answers marked."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megacm3.data.images import Reject
from megacm3.data.sources import Rejected, Sample, Shard, expand, find_shards
from megacm3.errors import ConfigError
from megacm3.sft import releases
from megacm3.sft.chat import chat_parts
from megacm3.sft.render import Part, choose_template, render, usable_templates
from megacm3.sft.tasks import MIXED, WAYS, Task, choose_tasks, make_task

KINDS = ("parquet", "jsonl", "dataset")
"""Kinds of shards that hold records, beside the releases' own files."""
_KEYS = ("key", "id", "uid", "question_id", "image_id")


@dataclass(frozen=True)
class SftOptions:
    """How records become documents. JSON-like, since it stands in the plan and in the store's manifest."""

    name: str
    """The task, or `mixed`: each record names its own in the field `task`."""
    tasks: dict[str, dict[str, Any]]
    """Definitions of the tasks (tasks.Task.to_json)."""
    way: str = "cm3leon"
    """tasks.WAYS."""
    variants: str = "one"
    """one (a template drawn for each record) | all (a document for every template that the record fills)."""
    seed: int = 0
    """Of the drawing of templates."""
    fields: dict[str, str] = field(default_factory=dict)
    """Field of the task -> column of the records, where they are called otherwise."""
    split: str = "train"
    """Of a release whose files hold several."""


def make_options(
    name: str, tasks_file: str, way: str, variants: str, seed: int, split: str, fields: dict[str, str], tokenizer: str
) -> SftOptions:
    """The options that flags give; an empty `way` is that of the text tokenizer's family.

    Raises ConfigError for an unknown task or way, or a way that the vocabulary cannot follow.
    """
    from megacm3.tokenizers.text import TextTokenizer

    tasks = {key: task.to_json() for key, task in choose_tasks(name, tasks_file).items()}
    chameleon = TextTokenizer.load(tokenizer).family == "chameleon"
    way = way or ("chameleon" if chameleon else "cm3leon")
    if way not in WAYS or variants not in ("one", "all"):
        raise ConfigError(f"--way {way}, --variants {variants}; expected {', '.join(WAYS)}, and one or all")
    if way == "cm3leon" and chameleon:
        raise ConfigError("--way cm3leon fills masked answers in, which a chameleon vocabulary has no sentinels for")
    return SftOptions(name, tasks, way, variants, seed, fields, split)


def sft_shards(inputs: Sequence[str], images: str, options: SftOptions, rows_per_unit: int) -> list[Shard]:
    """The shards of tables of records, or of one release's own files (.json, .token, .csv).

    Raises DataError when nothing is there or a release is not recognised, ConfigError for other kinds of files.
    """
    paths = sorted({path for pattern in inputs for path in expand(pattern)})
    own = [path for path in paths if path.endswith(releases.SUFFIXES)]
    if images and not os.path.isdir(images):
        raise ConfigError(f"--images {images} is no folder")
    folder = os.path.abspath(images) if images else ""
    if not own:
        shards = find_shards(paths, rows_per_unit)
        wrong = next((shard for shard in shards if shard.kind not in KINDS), None)
        if wrong is not None:
            raise ConfigError(f"--input {wrong.path}: fine-tuning reads jsonl, parquet, data sets and release files")
        return [dataclasses.replace(shard, images=folder) for shard in shards]
    if len(own) != len(paths):
        raise ConfigError(f"--input mixes release files such as {own[0]} with tables; give them to two runs")
    count = len(releases.load(tuple(own), options.split))
    name = "+".join(os.path.basename(path) for path in own)
    starts = range(0, count, rows_per_unit)
    spans = [(start, min(start + rows_per_unit, count)) for start in starts]
    return [Shard(f"{name}[{a}:{b}]", own[0], "release", (a, b), tuple(own), folder) for a, b in spans]


def read_sft(shard: Shard, options: SftOptions) -> Iterator[Sample | Rejected]:
    """The samples of one shard. `row` counts what the shard gives, since one record may give several samples."""
    tasks = {name: make_task(name, entry) for name, entry in options.tasks.items()}
    row = 0
    for number, record in _rows(shard, options.split):
        for given in [record] if isinstance(record, Reject) else releases.records_of(record, options.split):
            key = _key(given, number)
            for item in _samples(given, key, shard, row, options, tasks):
                yield item
                row += 1


def _rows(shard: Shard, split: str) -> Iterator[tuple[int, dict[str, Any] | Reject]]:
    from megacm3.data import tables

    if shard.kind == "release":
        assert shard.rows is not None
        first, last = shard.rows
        yield from enumerate(releases.load(shard.files, split)[first:last], first)
    elif shard.kind == "parquet":
        yield from tables.parquet_rows(shard)
    elif shard.kind == "jsonl":
        yield from tables.jsonl_rows(shard)
    else:
        yield from tables.set_rows(shard)


def _key(record: Mapping[str, Any] | Reject, number: int) -> str:
    if isinstance(record, Reject):
        return record.key if isinstance(record, releases.Gap) and record.key else str(number)
    return str(next((record[name] for name in _KEYS if record.get(name) is not None), number))


def _samples(
    record: dict[str, Any] | Reject, key: str, shard: Shard, row: int, options: SftOptions, tasks: dict[str, Task]
) -> Iterator[Sample | Rejected]:
    try:
        if isinstance(record, Reject):
            raise record
        task = _task(record, options, tasks)
        for i, parts in enumerate(_documents(record, key, shard, options, task)):
            contents, answers = zip(*((part.content, part.answer) for part in parts), strict=True)
            name = key if i == 0 else f"{key}/{i}"
            yield Sample(name, shard.name, row + i, contents, answers=answers, task=task.name)
    except Reject as reject:
        yield Rejected(key, shard.name, row, reject.reason, reject.detail)


def _task(record: Mapping[str, Any], options: SftOptions, tasks: dict[str, Task]) -> Task:
    name = str(record.get("task")) if options.name == MIXED else options.name
    if name not in tasks:
        raise Reject("unknown_task", f"field task = {record.get('task')!r}; expected one of {', '.join(tasks)}")
    return tasks[name]


def _documents(record: dict[str, Any], key: str, shard: Shard, options: SftOptions, task: Task) -> list[list[Part]]:
    from megacm3.data.tables import picture_bytes

    folder = Path(shard.images or shard.path)
    load: Callable[[Any], bytes] = partial(picture_bytes, table=folder)
    renamed = record | {name: record.get(column) for name, column in options.fields.items()}
    if task.chat:
        return [chat_parts(task, renamed, load, options.way)]
    fields = _fields(task, renamed)
    if options.variants == "all":
        chosen = usable_templates(task, fields)
    else:
        chosen = [choose_template(task, fields, key, options.seed)]
    needed = set().union(*(task.fields(number) for number in chosen))
    fields |= {name: load(fields[name]) for name in task.pictures if name in needed}
    return [render(task, number, fields, options.way) for number in chosen]


def _fields(task: Task, record: dict[str, Any]) -> dict[str, Any]:
    """The record, with pictures that it does not name taken in order from its `images`."""
    images = record.get("images")
    rest = iter(images if isinstance(images, list) else [])
    fields = {name: value for name, value in record.items() if name != "images" and value is not None}
    for name in task.pictures:
        if name not in fields:
            value = next(rest, None)
            fields |= {name: value} if value is not None else {}
    return fields
