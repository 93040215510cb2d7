"""VQAv2's accuracy (Antol et al. 2015; Goyal et al. 2017): an answer counts as far as people gave it too.

Each of a question's answers is left out in turn; the accuracy is the mean of min(matches among the others / 3, 1).
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megacm3.errors import DataError

_NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True))
_NUMBERS["none"] = "0"
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTED = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's i'd "
    "i'll i'm i've isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't o'clock oughtn't shan't "
    "she's should've shouldn't somebody's someone's something's that'd that's there'd there's they'd they'll they're "
    "they've wasn't we'd we've weren't what'll what're what's what've when's where'd where's where've who'd who'll "
    "who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"
).split()
# Written without the apostrophe by many annotators. Words that mean something else then (were, ill, its) are not here.
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED} | {"id": "id", "ill": "ill"}


def normalize(answer: str) -> str:
    """An answer as the rule compares it: lower case, no articles, digits for small numbers, no punctuation."""
    given = text = answer.replace("\n", " ").replace("\t", " ").strip().lower()
    grouped = re.search(r"\d,\d", given) is not None
    for mark in _PUNCTUATION:
        # Between two words a mark becomes a space; beside a space of the answer (or where 1,000 occurs) it is struck.
        beside = f"{mark} " in given or f" {mark}" in given or grouped
        text = text.replace(mark, "" if beside else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(answer: str, people: Sequence[str]) -> float:
    """Accuracy 0..1 of one answer against those that people gave (ten in VQAv2). Raises DataError for none."""
    if not people:
        raise DataError("a question has no answers of people; expected at least one")
    given, others = normalize(answer), [normalize(other) for other in people]
    if len(others) == 1:
        return float(given == others[0])
    matches = [sum(other == given for j, other in enumerate(others) if j != i) for i in range(len(others))]
    return sum(min(count / 3, 1.0) for count in matches) / len(others)


def read_people(path: str | Path) -> dict[str, list[str]]:
    """key -> answers, from VQAv2's or OK-VQA's annotations (by question_id) or VizWiz's list (by picture).

    A file of questions alone gives none. Raises DataError for a file of another form.
    """
    try:
        found: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(found, dict) and "questions" in found and "annotations" not in found:
            return {}
        entries = found["annotations"] if isinstance(found, dict) else found
        return {
            str(entry.get("question_id", entry.get("image"))): [str(one["answer"]) for one in entry["answers"]]
            for entry in entries
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise DataError(
            f"--answers {path}: {type(fault).__name__} {fault}; expected annotations of VQAv2, OK-VQA or VizWiz"
        ) from fault
