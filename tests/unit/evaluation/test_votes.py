"""Votes counted: figures worked out by hand, and files that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from megacm3.errors import DataError
from megacm3.evaluation.votes import alpha, count_votes, interval, majority, read_votes, win_rate
from tests.helpers.tools import run_tool

PAGE = "f" * 64


def write_key(folder: Path) -> Path:
    """Four pairs; the second model stands left in pairs 1 and 3."""
    rows = [{"pair": i, "key": f"k{i}", "task": "ab"[i // 2], "left": "xy"[i % 2]} for i in range(4)]
    path = folder / "page.html.key.json"
    path.write_text(json.dumps({"page": PAGE, "models": ["x", "y"], "seed": 0, "pairs": rows}))
    return path


def write_votes(folder: Path, name: str, votes: list[tuple[int, str, str, str]], page: str = PAGE) -> Path:
    rows = [{"pair": pair, "left": left, "right": right, "better": better} for pair, left, right, better in votes]
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"page": page, "annotator": name, "votes": rows}))
    return path


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, list[Path]]:
    """pair 0: x, x, tie -> x. pair 1 (y left): y, y, y -> y. pair 2: x, tie, y -> no majority, a tie. pair 3 (y left):
    right, right, left = x, x, y -> x.
    """
    given = {
        "ann": [("fully", "no", "left"), ("fully", "no", "left"), ("no", "no", "left"), ("no", "fully", "right")],
        "ben": [("fully", "no", "left"), ("fully", "no", "left"), ("fully", "no", "same"), ("no", "fully", "right")],
        "cem": [("no", "no", "same"), ("fully", "fully", "left"), ("partially", "no", "right"), ("no", "no", "left")],
    }
    paths = [write_votes(tmp_path, name, [(i, *vote) for i, vote in enumerate(votes)]) for name, votes in given.items()]
    return write_key(tmp_path), paths


def test_figures_worked_out_by_hand(three: tuple[Path, list[Path]]) -> None:
    models, judged, people = read_votes(*three)
    assert models == ["x", "y"] and people == ["ann", "ben", "cem"]
    found = count_votes(models, judged)
    assert found["wins"] == {"x": 2, "y": 1} and found["ties"] == 1
    assert found["win_rate"] == (2 + 0.5) / 4
    # votes: x x - | y y y | x - y | x x y = 5 wins, 2 ties of 12
    assert found["win_rate_of_votes"] == (5 + 1) / 12
    assert found["votes"] == 12 and found["pairs_with_fewer_annotators"] == 0
    assert found["agreement"]["all_agree"] == 1 / 4
    # x: fully (2 of 3) | no, no, fully -> no | no, fully, partially -> partially | fully, fully, no -> fully
    assert found["fulfils"]["x"] == {"fully": 0.5, "partially": 0.25, "no": 0.25}
    # y: no | fully | no | no
    assert found["fulfils"]["y"] == {"fully": 0.25, "partially": 0.0, "no": 0.75}
    assert found["tasks"]["a"]["win_rate"] == 0.5 and found["tasks"]["b"]["win_rate"] == 0.75
    assert found["tasks"]["b"]["wins"] == {"x": 1, "y": 0}


def test_a_pair_with_two_of_three_is_counted_and_told(three: tuple[Path, list[Path]], tmp_path: Path) -> None:
    key, paths = three
    short = write_votes(tmp_path, "cem", [(0, "fully", "no", "right")])
    found = count_votes(*read_votes(key, [*paths[:2], short])[:2])
    assert found["pairs_with_fewer_annotators"] == 3 and found["pairs"] == 4
    # pair 2: x against a tie, one vote each: no majority
    assert found["wins"] == {"x": 2, "y": 1} and found["ties"] == 1


def test_majorities_and_ties_split() -> None:
    assert majority(("x", "x", "y"), "") == "x"
    assert majority(("x", "y", ""), "") == majority(("x", "y"), "") == ""
    assert win_rate(["x", "", "y", ""], "x") == win_rate(["x", "", "y", ""], "y") == 0.5


def test_alpha_of_krippendorffs_own_example() -> None:
    """Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C: nominal data of four observers with
    values missing, alpha = 0.743.
    """
    observers = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    units = [[row[i] for row in observers if row[i] != "."] for i in range(12)]
    assert alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_alpha_by_hand() -> None:
    # two units of two labels: one agrees on a, one is a, b. Coincidences: a-a 2, a-b 2; n = 4, n_a = 3, n_b = 1.
    # 1 - (4 - 1) * 2 / (16 - 9 - 1) = 0
    assert alpha([("a", "a"), ("a", "b")]) == 0.0
    assert alpha([("a", "a"), ("b", "b"), ("c",)]) == 1.0
    assert alpha([("a", "a"), ("a", "a")]) is None and alpha([("a",)]) is None


def test_the_interval_holds_the_rate_and_narrows() -> None:
    winners = ["x"] * 6 + [""] * 2 + ["y"] * 2
    low, high = interval(winners, "x")
    wide = high - low
    assert 0 < low < win_rate(winners, "x") == 0.7 < high < 1
    # scores 1, 0.5, 0: variance 0.16, so that 95 % is 0.7 -+ 1.96 * 0.4 / sqrt(10), in steps of 0.05
    assert low == pytest.approx(0.7 - 1.96 * 0.4 / 10**0.5, abs=0.05)
    low, high = interval(winners * 100, "x")
    assert high - low == pytest.approx(2 * 1.96 * 0.4 / 1000**0.5, rel=0.05) and high - low < wide / 8
    assert interval(["x"] * 5, "x") == (1.0, 1.0)
    assert interval(winners, "x") == interval(winners, "x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"page": "0" * 64}, "has votes of page 000000000000; expected ffffffffffff"),
        ({"votes": [(7, "fully", "no", "left")]}, "pair 7 is not on the page"),
        ({"votes": [(1, "fully", "no", "left")] * 2}, "pair 1 is there twice"),
        ({"votes": [(1, "great", "no", "left")]}, "pair 1: left is 'great'; expected fully, partially, no"),
        ({"votes": [(1, "fully", "no", "x")]}, "pair 1: better is 'x'; expected left, same, right"),
        ({"votes": []}, "no vote; expected at least one"),
    ],
)
def test_other_votes_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    votes = change.get("votes", [(0, "fully", "no", "left")])
    path = write_votes(tmp_path, "ann", votes, change.get("page", PAGE))
    with pytest.raises(DataError, match=words):
        read_votes(write_key(tmp_path), [path])


def test_an_annotator_twice_and_files_of_another_kind_are_refused(three: tuple[Path, list[Path]]) -> None:
    key, paths = three
    with pytest.raises(DataError, match="are both of 'ann'; expected one file each"):
        read_votes(key, [paths[0], paths[0]])
    with pytest.raises(DataError, match="lacks some of page, annotator, votes"):
        read_votes(key, [key])
    with pytest.raises(DataError, match="lacks some of page, models, pairs"):
        read_votes(paths[0], paths)
    with pytest.raises(DataError, match="does not exist; expected votes"):
        read_votes(key, ["nowhere.json"])
    paths[0].write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        read_votes(key, paths)


def test_the_command_makes_a_page_and_counts(three: tuple[Path, list[Path]], tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"key": "k", "prompt": "p", "text": f"by {name[::-1]}"}))
    answers = [str(tmp_path / f"{name}.jsonl") for name in ("one", "two")]
    code, said = run_tool("compare_people", "page", "--answers", *answers, "--output", str(tmp_path / "new.html"))
    assert code == 0 and (tmp_path / "new.html").exists() and (tmp_path / "new.html.key.json").exists(), said
    key, paths = three
    arguments = ["count", "--key", str(key), "--votes", *map(str, paths), "--output", str(tmp_path / "result.json")]
    code, said = run_tool("compare_people", *arguments)
    assert code == 0, said
    assert json.loads((tmp_path / "result.json").read_text())["win_rate"] == 0.625
    code, said = run_tool("compare_people", "count", "--key", str(key), "--votes", str(key))
    assert code == 3
