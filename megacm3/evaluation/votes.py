"""Counts the votes of a blind page: tasks fulfilled, win rate with ties split, agreement, by task.

The label of a pair is what more than half of its annotators chose. Where there is no such majority, the pair is a tie,
and an answer fulfils its task partially. Chameleon has three annotators a pair and counts likewise.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacm3.command import seed_from
from megacm3.errors import DataError
from megacm3.files import read_json

FULFILS = ("fully", "partially", "no")
BETTER = ("left", "same", "right")
SAMPLES = 10000
"""Of the bootstrap."""


@dataclass(frozen=True)
class Judged:
    """One pair with everyone's votes, by model."""

    task: str
    better: tuple[str, ...]
    """A model's name or "" for about the same, one an annotator."""
    fulfils: dict[str, tuple[str, ...]]
    """Of each model's answer."""


def read_votes(key: str | Path, paths: Sequence[str | Path]) -> tuple[list[str], list[Judged], list[str]]:
    """Names of the models, pairs with at least one vote, annotators.

    key: PAGE.key.json. Raises DataError for votes of another page, an annotator twice, pairs or votes that there are
    not.
    """
    secret = _read(key, ("page", "models", "pairs"), "the key beside a blind page")
    left = {row["pair"]: row["left"] for row in secret["pairs"]}
    given: dict[int, list[dict[str, Any]]] = {}
    people: dict[str, Path] = {}
    for path in map(Path, paths):
        found = _read(path, ("page", "annotator", "votes"), "votes downloaded from a blind page")
        if found["page"] != secret["page"]:
            raise DataError(
                f"{path} has votes of page {str(found['page'])[:12]}; expected {secret['page'][:12]}, that of {key}"
            )
        if found["annotator"] in people:
            raise DataError(
                f"{path} and {people[found['annotator']]} are both of '{found['annotator']}'; expected one file each"
            )
        people[found["annotator"]] = path
        for number, vote in _checked(found["votes"], left, path).items():
            given.setdefault(number, []).append(vote)
    if not given:
        raise DataError(f"{', '.join(map(str, paths))}: no vote; expected at least one pair with all three answers")
    models = secret["models"]
    rows = {row["pair"]: row for row in secret["pairs"]}
    judged = [_judged(rows[number], given[number], models) for number in sorted(given)]
    return models, judged, sorted(people)


def _read(path: str | Path, keys: tuple[str, ...], what: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise DataError(f"{path} does not exist; expected {what}")
    found = read_json(path)
    if not isinstance(found, dict) or not set(keys) <= found.keys():
        raise DataError(f"{path} lacks some of {', '.join(keys)}; expected {what}")
    return found


def _checked(votes: Any, known: dict[int, str], path: Path) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for vote in votes:
        number = vote.get("pair")
        if number not in known or number in found:
            raise DataError(f"{path}: pair {number} is {'there twice' if number in found else 'not on the page'}")
        for name, legal in (("left", FULFILS), ("right", FULFILS), ("better", BETTER)):
            if vote.get(name) not in legal:
                raise DataError(f"{path}: pair {number}: {name} is {vote.get(name)!r}; expected {', '.join(legal)}")
        found[number] = vote
    return found


def _judged(row: dict[str, Any], votes: list[dict[str, Any]], models: list[str]) -> Judged:
    right = next(name for name in models if name != row["left"])
    side = {row["left"]: "left", right: "right"}
    named = {"left": row["left"], "right": right, "same": ""}
    better = tuple(named[vote["better"]] for vote in votes)
    return Judged(row["task"], better, {name: tuple(vote[side[name]] for vote in votes) for name in models})


def majority(labels: Sequence[str], otherwise: str) -> str:
    """What more than half chose, or `otherwise`."""
    label, count = Counter(labels).most_common(1)[0]
    return label if 2 * count > len(labels) else otherwise


def win_rate(winners: Sequence[str], model: str) -> float:
    """Share of the pairs that `model` won, ties ("") counted half."""
    return sum(1.0 if name == model else 0.5 if not name else 0.0 for name in winners) / len(winners)


def interval(winners: Sequence[str], model: str, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap over the pairs of `win_rate`."""
    scores = np.array([1.0 if name == model else 0.5 if not name else 0.0 for name in winners])
    rng = np.random.Generator(np.random.PCG64(seed_from("bootstrap", seed)))
    # Only how often each of the three scores is drawn counts.
    values, counts = np.unique(scores, return_counts=True)
    means = rng.multinomial(len(scores), counts / len(scores), SAMPLES) @ values / len(scores)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def alpha(units: Sequence[Sequence[str]]) -> float | None:
    """Krippendorff's alpha for nominal labels, any number of annotators a unit; None where all labels are equal.

    1 - (n - 1) * sum of disagreeing pairs within units / disagreeing pairs over all; units with one label say nothing.
    """
    units = [unit for unit in units if len(unit) > 1]
    total: Counter[str] = sum((Counter(unit) for unit in units), Counter())
    n = sum(total.values())
    expected = n * n - sum(count * count for count in total.values())
    if not expected:
        return None
    observed = sum((len(unit) ** 2 - sum(c * c for c in Counter(unit).values())) / (len(unit) - 1) for unit in units)
    return 1 - (n - 1) * observed / expected


def count_votes(models: Sequence[str], judged: Sequence[Judged], people: int = 3) -> dict[str, Any]:
    """The figures over all pairs and for each task. people: annotators a pair should have."""
    tasks: dict[str, list[Judged]] = {}
    for pair in judged:
        tasks.setdefault(pair.task or "(no task)", []).append(pair)
    result = _figures(models, judged, people)
    return result | {"tasks": {task: _figures(models, pairs, people) for task, pairs in tasks.items()}}


def _figures(models: Sequence[str], judged: Sequence[Judged], people: int) -> dict[str, Any]:
    first, second = models
    winners = [majority(pair.better, "") for pair in judged]
    shared = [pair for pair in judged if len(pair.better) > 1]
    figures: dict[str, Any] = {
        "pairs": len(judged),
        "votes": sum(len(pair.better) for pair in judged),
        "pairs_with_fewer_annotators": sum(len(pair.better) < people for pair in judged),
        "wins": {name: winners.count(name) for name in models},
        "ties": winners.count(""),
        "win_rate": win_rate(winners, first),
        "win_rate_interval": interval(winners, first),
        "win_rate_of_votes": win_rate([name for pair in judged for name in pair.better], first),
        "agreement": {
            "all_agree": sum(len(set(pair.better)) == 1 for pair in shared) / len(shared) if shared else None,
            "alpha_better": alpha([pair.better for pair in judged]),
            "alpha_fulfils": alpha([pair.fulfils[name] for name in models for pair in judged]),
        },
    }
    labels = {name: [majority(pair.fulfils[name], "partially") for pair in judged] for name in (first, second)}
    figures["fulfils"] = {
        name: {each: found.count(each) / len(found) for each in FULFILS} for name, found in labels.items()
    }
    return figures


def table(models: Sequence[str], result: dict[str, Any]) -> list[list[str]]:
    """Rows of the figures for people: all pairs, then each task."""
    first, second = models
    rows = [["task", "pairs", f"win rate of {first}", "95 %", f"{first} : tie : {second}", "fully, partially, no"]]
    for task, found in {"all": result, **result["tasks"]}.items():
        low, high = found["win_rate_interval"]
        wins = f"{found['wins'][first]} : {found['ties']} : {found['wins'][second]}"
        done = "; ".join(
            f"{name} " + ", ".join(f"{found['fulfils'][name][each]:.1%}" for each in FULFILS) for name in models
        )
        rows.append([task, str(found["pairs"]), f"{found['win_rate']:.1%}", f"{low:.1%} to {high:.1%}", wins, done])
    return rows
