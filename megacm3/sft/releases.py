"""Public releases in their own files: recognised by what is in them, turned into the fields of templates.

    COCO captions          captions_train2017.json                                   image, caption
    VQAv2, OK-VQA          ..._questions.json and ..._annotations.json               image, question, answer
    VizWiz                 train.json                                                image, question, answer
    ScienceQA              problems.json (pid_splits.json may lie beside), or HF rows  question, context, choices, ...
    Flickr30k              results_20130124.token, results.csv, flickr_annotations_30k.csv, or HF rows   image, caption
    Localized Narratives   ..._localized_narratives*.jsonl                           image, caption
    InstructPix2Pix        HF rows (parquet or a saved data set)                     image1, instruction, image2

Pictures are named as in the releases' image folders (--images). Questions and answers meet by question_id, never by
their place in a list.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from megacm3.data.filters import PREFIX
from megacm3.data.images import Reject
from megacm3.errors import DataError

SUFFIXES = (".json", ".token", ".csv")
"""Of releases that are not tables of records."""


class Gap(Reject):
    """A record of a release that cannot be used; `key` says which one."""

    def __init__(self, key: object, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.key = str(key)


Record = dict[str, Any] | Gap
_EXPECTED = (
    "expected COCO captions, VQAv2's or OK-VQA's questions and annotations, VizWiz, ScienceQA's problems.json, "
    "or Flickr30k's .token or .csv"
)


@lru_cache(maxsize=1)
def load(paths: tuple[str, ...], split: str) -> list[Record]:
    """All records of one release's files, in their order. Raises DataError for damage and for an unknown layout."""
    try:
        return _load(paths, split)
    except (KeyError, TypeError, ValueError, AttributeError) as fault:
        raise DataError(
            f"{', '.join(paths)}: an entry is damaged: {type(fault).__name__} {fault}; {_EXPECTED}"
        ) from fault


def _load(paths: tuple[str, ...], split: str) -> list[Record]:
    found: dict[str, Any] = {}
    for path in paths:
        if path.endswith(".json"):
            found[path] = _json(path)
    if not found:
        return [record for path in paths for record in _flickr(path, split)]
    values = list(found.values())
    if len(found) == 2 and {"questions", "annotations"} <= {name for value in values for name in _names(value)}:
        return list(_vqa(*_pair(found)))
    problems = [value for value in values if not _is_splits(value)]
    if len(problems) == 1 and len(found) == len(paths):
        value = problems[0]
        if {"images", "annotations"} <= _names(value):
            return list(_coco(value, next(iter(found))))
        if isinstance(value, list) and value and {"image", "question"} <= _names(value[0]):
            return [_vizwiz(entry) for entry in value]
        if isinstance(value, dict) and value and {"question", "choices"} <= _names(next(iter(value.values()))):
            return _problems(value, split)
    raise DataError(f"{', '.join(paths)}: no release that is known; {_EXPECTED}")


def _json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (UnicodeDecodeError, json.JSONDecodeError) as fault:
        raise DataError(f"{path} is no whole JSON file: {fault}") from fault


def _names(value: Any) -> set[str]:
    return set(value) if isinstance(value, dict) else set()


def _is_splits(value: Any) -> bool:
    return isinstance(value, dict) and {"train", "val", "test"} <= set(value)


def _pair(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    questions = next(value for value in found.values() if "questions" in _names(value))
    return questions, next(value for value in found.values() if "annotations" in _names(value))


def _coco(value: dict[str, Any], path: str) -> Iterator[Record]:
    names = {image["id"]: image["file_name"] for image in value["images"]}
    if value["annotations"] and "caption" not in value["annotations"][0]:
        raise DataError(f"{path} holds annotations without captions (boxes or key points?); {_EXPECTED}")
    described = set()
    for entry in value["annotations"]:
        described.add(entry["image_id"])
        if entry["image_id"] not in names:
            yield Gap(
                entry["id"],
                "no_image",
                f"caption {entry['id']} is of image {entry['image_id']}, which is not in the list",
            )
            continue
        yield {"key": entry["id"], "image": names[entry["image_id"]], "caption": entry["caption"]}
    for image, name in names.items():
        if image not in described:
            yield Gap(name, "no_caption", f"image {name} has no caption")


def _vqa(questions: dict[str, Any], annotations: dict[str, Any]) -> Iterator[Record]:
    subtype = questions.get("data_subtype") or annotations.get("data_subtype")
    if not subtype:
        raise DataError("questions and annotations lack data_subtype (such as train2014), which names the pictures")
    answers: dict[Any, dict[str, Any]] = {}
    twice = set()
    for entry in annotations["annotations"]:
        if entry["question_id"] in answers:
            twice.add(entry["question_id"])
        answers[entry["question_id"]] = entry
    asked = Counter(entry["question_id"] for entry in questions["questions"])
    for entry in questions["questions"]:
        number = entry["question_id"]
        answer = answers.get(number)
        if asked[number] > 1 or number in twice:
            yield Gap(number, "duplicate_name", f"question_id {number} occurs twice")
        elif answer is None:
            yield Gap(number, "no_answer", f"question_id {number} has no annotation")
        elif answer["image_id"] != entry["image_id"]:
            yield Gap(
                number, "wrong_image", f"question_id {number} is of two images: {entry['image_id']} in the questions"
            )
        else:
            name = f"COCO_{subtype}_{int(entry['image_id']):012d}.jpg"
            yield {"key": number, "image": name, "question": entry["question"], "answer": answer_of(answer)}
    for number in answers:
        if number not in asked:
            yield Gap(number, "no_question", f"annotation of question_id {number} has no question")


def answer_of(entry: Mapping[str, Any]) -> str | None:
    """The answer to learn: `multiple_choice_answer`, else the most frequent of `answers`, the first of equals."""
    if entry.get("multiple_choice_answer"):
        return str(entry["multiple_choice_answer"])
    counts = Counter(str(answer["answer"]) for answer in entry.get("answers") or [])
    return counts.most_common(1)[0][0] if counts else None


def _vizwiz(entry: Mapping[str, Any]) -> Record:
    answer = answer_of(entry)
    if answer is None:
        return Gap(entry["image"], "no_answer", f"{entry['image']} has no answers (the test split has none)")
    return {"key": entry["image"], "image": entry["image"], "question": entry["question"], "answer": answer}


def _problems(value: dict[str, Any], split: str) -> list[Record]:
    chosen = [(pid, entry) for pid, entry in value.items() if entry.get("split") == split]
    if not chosen:
        found = ", ".join(sorted({str(entry.get("split")) for entry in value.values()}))
        raise DataError(f"problems.json has no problem of --split {split}; it has {found}")
    records: list[Record] = []
    for pid, entry in chosen:
        image = f"{split}/{pid}/{entry['image']}" if entry.get("image") else None
        records.append(_science(entry | {"key": pid, "image": image}))
    return records


def _science(entry: Mapping[str, Any]) -> Record:
    key = entry.get("key", "")
    if entry.get("image") is None:
        # CM3Leon's 6k examples are the train problems that have a picture.
        return Gap(key, PREFIX + "no_image", "a problem without a picture")
    choices, answer = list(entry["choices"]), entry["answer"]
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        return Gap(key, "no_answer", f"answer {answer!r} of {len(choices)} choices")
    record = {"image": entry["image"], "question": entry["question"], "choices": choices, "answer": choices[answer]}
    # The release's own prompts write N/A for an empty hint.
    record |= {"context": entry.get("hint") or "N/A", "explanation": entry.get("solution") or None}
    return record | ({"key": entry["key"]} if "key" in entry else {})


def _flickr(path: str, split: str) -> Iterator[Record]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            if path.endswith(".token"):
                yield from _tokens(file)
            elif file.readline().replace(" ", "").startswith("image_name|comment_number|comment"):
                yield from _bars(file)
            else:
                file.seek(0)
                yield from _annotations(file, path, split)
    except (UnicodeDecodeError, csv.Error) as fault:
        raise DataError(f"{path} is no text of Flickr30k's: {fault}") from fault


def _tokens(lines: Iterable[str]) -> Iterator[Record]:
    for number, line in enumerate(lines):
        match = re.fullmatch(r"([^#\t]+)#(\d+)\t(.*)", line.rstrip("\r\n"))
        if match is None:
            yield Gap(number + 1, "invalid_line", f"line {number + 1}: expected NAME.jpg#N, a tab, the caption")
            continue
        yield {"key": f"{match[1]}#{match[2]}", "image": match[1], "caption": match[3]}


def _bars(lines: Iterable[str]) -> Iterator[Record]:
    for number, line in enumerate(lines):
        # One line of the release (2199200615.jpg) lacks its second bar: the number and the caption tell themselves.
        match = re.fullmatch(r"\s*([^|]+?)\s*\|\s*(\d+)\s*(?:\||\s)\s*(.+?)\s*", line)
        if match is None:
            yield Gap(number + 2, "invalid_line", f"line {number + 2}: expected NAME.jpg| N| caption")
            continue
        yield {"key": f"{match[1]}#{match[2]}", "image": match[1], "caption": match[3]}


def _annotations(file: Iterable[str], path: str, split: str) -> Iterator[Record]:
    rows = csv.DictReader(file)
    if not {"raw", "split", "filename"} <= set(rows.fieldnames or []):
        raise DataError(f"{path} has the columns {', '.join(rows.fieldnames or [])}; {_EXPECTED}")
    for row in rows:
        try:
            captions = json.loads(row["raw"])
        except json.JSONDecodeError as fault:
            yield Gap(row["filename"], "invalid_json", f"captions of {row['filename']}: {fault}")
            continue
        entry = {"image": row["filename"], "caption": captions, "split": row["split"], "filename": row["filename"]}
        yield from _captions(entry, split)


def _captions(row: Mapping[str, Any], split: str) -> Iterator[Record]:
    if row["split"] != split:
        yield Gap(row["filename"], PREFIX + "other_split", f"{row['filename']} is of split {row['split']}")
        return
    for number, caption in enumerate(row["caption"]):
        yield {"key": f"{row['filename']}#{number}", "image": row["image"], "caption": caption}


def _narrative(row: Mapping[str, Any]) -> Record:
    number = str(row["image_id"])
    coco = "coco" in str(row["dataset_id"]).lower()
    name = f"{int(number):012d}.jpg" if coco and number.isdigit() else f"{number}.jpg"
    return {"key": f"{number}/{row['annotator_id']}", "image": name, "caption": row["caption"]}


_ROWS: tuple[tuple[frozenset[str], Callable[[Mapping[str, Any], str], Iterable[Record]]], ...] = (
    (frozenset({"dataset_id", "image_id", "annotator_id", "caption"}), lambda row, _: [_narrative(row)]),
    (frozenset({"question", "choices", "answer", "hint"}), lambda row, _: [_science(row)]),
    (frozenset({"image", "caption", "sentids", "split", "filename"}), _captions),
    (
        frozenset({"original_image", "edit_prompt", "edited_image"}),
        lambda row, _: [
            {"image1": row["original_image"], "instruction": row["edit_prompt"], "image2": row["edited_image"]}
        ],
    ),
    (
        frozenset({"input_image", "edit_prompt", "edited_image"}),
        lambda row, _: [
            {"image1": row["input_image"], "instruction": row["edit_prompt"], "image2": row["edited_image"]}
        ],
    ),
)
"""Columns by which a release's row is known, and what it becomes."""


def records_of(row: dict[str, Any], split: str) -> Iterable[Record]:
    """The records of one row of a table: the release's fields turned into the templates', any other row as it is.

    A row that lacks what its release's rows have is a Gap.
    """
    for columns, convert in _ROWS:
        if columns <= row.keys():
            try:
                return list(convert(row, split))
            except (KeyError, TypeError, ValueError) as fault:
                return [Gap("", "invalid_row", f"{type(fault).__name__}: {fault}")]
    return [row]
