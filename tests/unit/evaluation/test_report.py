"""The pages: whole, self-contained, safe against captions that hold markup."""

import json
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from megacm3.errors import DataError
from megacm3.evaluation import charts
from megacm3.evaluation.fidelity import Settings
from megacm3.evaluation.page import Figure, Section, render
from megacm3.evaluation.pictures import png_bytes
from megacm3.evaluation.report import Places, quickstart_report
from megacm3.files import write_json
from tests.helpers.tools import run_tool


def metrics(folder, steps=30):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, steps + 1):
        loss = 5 / step + 0.1 * rng.random()
        line = {"step": step, "loss": loss, "loss_text": None if step == 3 else loss, "loss_image": loss + 1}
        lines.append(json.dumps(line | {"grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 4000.0}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def needs_nothing_from_the_network(page):
    """No address outside the page in anything that a browser would load."""
    loaded = re.findall(r"""(?:src|href|action)\s*=\s*["']([^"']+)|url\(([^)]+)\)|@import ([^;]+)""", page)
    addresses = [next(filter(None, found)) for found in loaded]
    return all(address.startswith(("data:", "#")) for address in addresses) and "<script" not in page


@pytest.fixture(scope="module")
def run(tmp_path_factory, hf_folder):
    """A quickstart-like folder without retrieval, and its pictures."""
    root = tmp_path_factory.mktemp("run")
    (root / "hf").symlink_to(hf_folder)
    metrics(root / "train")
    steps = [{"step": "text <tokenizer>", "seconds": 2.5}, {"step": "training", "seconds": 61}]
    (root / "timings.jsonl").write_text("".join(json.dumps(step) + "\n" for step in [*steps, steps[0]]))
    write_json(root / "perplexity.json", {"documents": 5, "text": {"loss": 1.5}, "image": {"loss": 2.25}})
    rng = np.random.default_rng(0)
    for name, count in (("train", 20), ("heldout", 5)):
        with tarfile.open(root / f"{name}.tar", "w") as tar:
            for i in range(count):
                picture = root / f"{name}{i}.png"
                picture.write_bytes(png_bytes(rng.integers(0, 256, (40, 40, 3), np.uint8)))
                tar.add(picture, f"{name}{i}.png")
                picture.with_suffix(".txt").write_text(f"<b>{name}</b> thing {i}")
                tar.add(picture.with_suffix(".txt"), f"{name}{i}.txt")
    return root


def test_quickstart_report_holds_all_its_parts(run):
    places = Places(run, [str(run / "train.tar")], [str(run / "heldout.tar")], Settings(count=8))
    found = quickstart_report(places)
    page = (run / "report.html").read_text()
    assert needs_nothing_from_the_network(page)
    for title in ("Pictures for new prompts", "Fidelity", "Text from pictures", "Image tokenizer", "Training", "Time"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("<figure") == 5 + 8 + 4 + 5 and page.count("<svg") == 4
    assert "<b>train</b>" not in page and "&lt;b&gt;train&lt;/b&gt; thing" in page  # captions are text
    assert "On the 5 held-out documents, in plain order: 2.25 per image token, 1.50 per text token." in page
    assert "text &lt;tokenizer&gt;" in page and "1 min 04 s" in page  # a step that ran twice counts once
    assert f"{found.fidelity:.0%}" in page
    assert json.loads((run / "fidelity.json").read_text())["fidelity"] == found.fidelity
    with Image.open(run / "samples.png") as sheet:
        assert sheet.width > 800 and "megacm3" in sheet.text["source"]


def test_a_run_without_metrics_is_refused(run, tmp_path):
    (tmp_path / "hf").symlink_to(run / "hf")
    with pytest.raises(DataError, match=r"metrics\.jsonl does not exist"):
        quickstart_report(Places(tmp_path, [str(run / "train.tar")]))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_equal_metrics_give_an_equal_chart(tmp_path):
    lines = charts.read_lines(metrics(tmp_path) / "metrics.jsonl")
    first, second = charts.loss_chart(lines), charts.loss_chart(lines)
    assert first == second and first.startswith("<svg") and "image tokens" in first
    assert len(charts.panels(lines)) == 4


def test_metrics_lines(tmp_path):
    path = metrics(tmp_path) / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 31, "lo')  # torn by a kill
    lines = charts.read_lines(path)
    assert len(lines) == 30
    steps, values = charts.series([*lines, {"step": 31, "loss_text": float("nan")}], "loss_text")
    assert len(steps) == len(values) == 29 and 3 not in steps and 31 not in steps
    path.write_text("{}\nnonsense\n{}\n")
    with pytest.raises(DataError, match="line 2"):
        charts.read_lines(path)
    for missing in (tmp_path / "none.jsonl", tmp_path / "empty.jsonl"):
        (tmp_path / "empty.jsonl").touch()
        with pytest.raises(DataError, match=r"does not exist|holds no line"):
            charts.read_lines(missing)


def test_smoothing_moves_nothing():
    falling = [float(100 - i) for i in range(100)]
    assert charts.smooth(falling) == pytest.approx(falling)
    assert charts.smooth([1.0, 2.0]) == [1.0, 2.0]


def test_a_page_of_nothing_and_of_hostile_text():
    evil = '"><script>alert(1)</script>'
    picture = np.zeros((4, 4, 3), np.uint8)
    page = render(evil, evil, [(evil, evil)], [Section(evil, evil, [(evil, [Figure(picture, [evil])])])])
    assert "<script" not in page and needs_nothing_from_the_network(page)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--run", "{run}/nowhere", "--input", "{run}/train.tar"], 4, "does not exist"),
        (["--run", "{run}", "--input", "{run}/none*.tar"], 3, "matches no file"),
        (["--run", "{run}", "--input", "{run}/train.tar", "--count", "99"], 2, "--count 99: found 20"),
    ],
)
def test_refusals_of_the_tool(run, arguments, code, message):
    code_found, line = run_tool("report", *(word.format(run=run) for word in arguments))
    assert code_found == code and message in line
