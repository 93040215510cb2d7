"""The page for blind comparisons: what it hides, what it refuses, and that a browser can vote on it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from megacm3.errors import DataError
from megacm3.evaluation.answer_files import AnswerRow, read_answers, write_answers
from megacm3.evaluation.blind_page import pair_up, write_blind_page

EVIL = (
    "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\"> <!-- \u2028 &amp;"
)
NAMES = ("alphamodel", "betamodel")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Eight prompts in two tasks, answered in text and pictures whose own notes name the model."""
    root, made = tmp_path_factory.mktemp("answers"), []
    for number, name in enumerate(NAMES):
        folder = root / name
        folder.mkdir()
        rows = []
        for i in range(8):
            info = PngInfo()
            info.add_text("Software", name)
            pixels = np.full((16, 16, 3), (40 * i % 256, 200 * number, 90), np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}_{i}.png", pnginfo=info)
            text, images = (f"answer {i} of kind {number}. {EVIL}", ()) if i % 2 else ("", (f"{name}_{i}.png",))
            rows.append(AnswerRow(f"p{i}", f"prompt {i} {EVIL}", text, images, (), "draw" if i % 2 == 0 else "say"))
        write_answers(folder / f"{name}.jsonl", rows if not number else rows[::-1])
        made.append(folder / f"{name}.jsonl")
    return made[0], made[1]


@pytest.fixture(scope="module")
def page(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blind_page(files, NAMES, tmp_path_factory.mktemp("page") / "page.html")[0]


def payload(page: Path) -> list[dict]:
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="pairs">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])  # type: ignore[no-any-return]


def test_the_file_is_read_as_written(files: tuple[Path, Path]) -> None:
    rows = read_answers(files[0])
    assert [row.key for row in rows] == [f"p{i}" for i in range(8)]
    assert rows[1].text.endswith(EVIL) and rows[0].images == ("alphamodel_0.png",)


def test_nothing_on_the_page_tells_which_model_is_which(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not any(name in text for name in (*NAMES, "p0", "p7"))
    assert not re.search(r"(src|href)\s*=\s*[\"']?(http|//|file)", text)
    pictures = [source for pair in payload(page) for side in ("left", "right") for source in pair[side]["images"]]
    assert len(pictures) == 8 and all(source.startswith("data:image/png;base64,") for source in pictures)
    import base64

    assert not any(b"Software" in base64.b64decode(source.partition(",")[2]) for source in pictures)


def test_the_key_tells_it_and_each_model_stands_left_in_half_of_each_task(page: Path) -> None:
    key = json.loads((page.parent / "page.html.key.json").read_text())
    shown = payload(page)
    for row in key["pairs"]:
        pair = shown[row["pair"]]
        number = NAMES.index(row["left"])
        assert pair["prompt"]["text"].startswith(f"prompt {row['key'][1:]} ")
        if row["task"] == "say":
            assert pair["left"]["text"].startswith(f"answer {row['key'][1:]} of kind {number}.")
            assert f"of kind {1 - number}." in pair["right"]["text"]
    for task in ("draw", "say"):
        lefts = [row["left"] for row in key["pairs"] if row["task"] == task]
        assert lefts.count(NAMES[0]) == 2 and len(lefts) == 4


def test_sides_and_order_are_drawn_by_the_seed_alone(files: tuple[Path, Path]) -> None:
    first, second = (read_answers(path) for path in files)
    drawn = [[(pair.first.key, pair.swapped) for pair in pair_up(first, second, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [key for key, _ in drawn[0]] != sorted(key for key, _ in drawn[0])
    assert [key for key, _ in drawn[0]] == [pair.first.key for pair in pair_up(first[::-1], second, 0)]


def test_what_does_not_match_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    rows = [AnswerRow("a", "one", "x"), AnswerRow("b", "two", "y")]
    for name, changed in (("few", rows[:1]), ("other", [rows[0], AnswerRow("b", "three", "y")]), ("all", rows)):
        write_answers(tmp_path / f"{name}.jsonl", changed)
    for name, words in (
        ("few", "1 prompts have an answer in one file only, such as 'b'"),
        ("other", "'b' has another"),
    ):
        with pytest.raises(DataError, match=words):
            write_blind_page((tmp_path / "all.jsonl", tmp_path / f"{name}.jsonl"), NAMES, tmp_path / "page.html")
    with pytest.raises(DataError, match="both models are called 'm'"):
        write_blind_page(files, ("m", "m"), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1 is not JSON"),
        ('{"text": "a"}', "line 1 has no 'key'"),
        ('{"key": "a"}', "neither 'text' nor 'images'"),
        ('{"key": "a", "text": 3}', "text is 3; expected a text"),
        ('{"key": "a", "images": "x.png"}', "images is 'x.png'; expected a list"),
        ('{"key": "a", "images": ["x.png"]}', "x.png does not exist"),
        ('{"key": "a", "text": ""}\n{"key": "a", "text": ""}', "line 2: key 'a' is there twice"),
        ("\n", "holds no answer"),
    ],
)
def test_a_bad_line_is_named(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text(line)
    with pytest.raises(DataError, match=words):
        read_answers(tmp_path / "answers.jsonl")


def test_a_picture_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no picture")
    write_answers(tmp_path / "a.jsonl", [AnswerRow("a", images=("x.png",))])
    with pytest.raises(DataError, match=r"x\.png cannot be read"):
        write_blind_page((tmp_path / "a.jsonl", tmp_path / "a.jsonl"), NAMES, tmp_path / "page.html")


DRIVER = """<script>
const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key }));
URL.createObjectURL = (blob) => { blob.text().then((text) => {
  document.body.dataset.votes = text; document.body.dataset.count = get("count").textContent; }); return "#"; };
const before = Object.keys(votes).length;
document.body.dataset.before = before;
if (!before) {
  download();
  document.body.dataset.warning = get("warning").textContent;
  get("name").value = "Zoë <b>"; get("name").dispatchEvent(new Event("input"));
  press("q"); press("p"); press("1"); press("ArrowRight"); press("w"); press("w"); press("i"); press("2");
  press("ArrowRight"); press("3");
}
download();
</script></body>"""


@pytest.mark.skipif(not CHROMIUM, reason="no chromium to open the page with")
def test_a_browser_votes_by_keys_keeps_them_and_hands_them_out(page: Path, tmp_path: Path) -> None:
    driven = tmp_path / "driven.html"
    driven.write_text(page.read_text(encoding="utf-8").replace("</body>", DRIVER), encoding="utf-8")

    def visit() -> dict[str, str]:
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--virtual-time-budget=2000", "--dump-dom", driven.as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
        assert "<title>Which answer is better?</title>" in shown  # no user text ran as a script
        import html

        return {
            name: html.unescape(value) for name, value in re.findall(r'data-(\w+)="([^"]*)"', shown.split("<main")[0])
        }

    found = visit()
    assert found["before"] == "0" and found["warning"].startswith("Write your name first")
    votes = json.loads(found["votes"])
    key = json.loads((page.parent / "page.html.key.json").read_text())
    assert votes["page"] == key["page"] and votes["annotator"] == "Zoë <b>"
    assert votes["votes"] == [
        {"pair": 0, "left": "fully", "right": "no", "better": "left"},
        {"pair": 1, "left": "partially", "right": "fully", "better": "same"},
    ]  # the third pair is not complete
    again = visit()
    assert again["before"] == "3" and json.loads(again["votes"]) == votes
    assert again["count"] == "pair 3 of 8, 2 done"
