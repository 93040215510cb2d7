"""generate, evaluate and report as a user runs them: outputs, refusals with their exit codes, nothing half-written."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from megacm3.evaluation.pictures import load_picture
from megacm3.inference.api import Generator
from tests.helpers import tiny_models
from tests.helpers.tools import TOOLS, run_tool


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny export and a picture."""
    root = tmp_path_factory.mktemp("generate")
    tiny_models.save_export(root / "hf")
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(noise).save(root / "in.png")
    (root / "text.png").write_text("no picture")
    return root


def generate(place, *arguments):
    return run_tool("generate", "--model", place / "hf", *arguments)


@pytest.mark.parametrize("tool", ["generate", "evaluate", "report"])
def test_help_is_fast(tool):
    best = 9.0
    for _ in range(3):
        start = time.monotonic()
        done = subprocess.run([sys.executable, TOOLS / f"{tool}.py", "--help"], capture_output=True, check=True)
        best = min(best, time.monotonic() - start)
    assert best < 1.0 and b"--" in done.stdout


def test_a_whole_process_prints_and_fails_as_it_should(place):
    command = [sys.executable, TOOLS / "generate.py", "--model", place / "hf"]
    good = [*command, "--prompt", "a red apple", "--output", place / "process.png"]
    done = subprocess.run(good, capture_output=True, text=True, check=True)
    assert "process.png: 1 picture" in done.stdout
    bad = subprocess.run([*command, "--image", place / "text.png"], capture_output=True, text=True, check=False)
    assert bad.returncode == 3 and bad.stderr.startswith("error: ") and "Traceback" not in bad.stderr


def test_one_picture_carries_its_prompt(place):
    assert generate(place, "--prompt", "a red apple", "--output", place / "one.png", "--seed", 3) == (0, "")
    with Image.open(place / "one.png") as picture:
        assert picture.size == (32, 32)
        assert picture.text["prompt"] == "a red apple" and picture.text["seed"] == "3"
    again = place / "again.png"
    generate(place, "--prompt", "a red apple", "--output", again, "--seed", 3)
    assert again.read_bytes() == (place / "one.png").read_bytes()


def test_several_pictures_become_a_sheet(place):
    words = ("--prompt", "a cat", "--prompt", "a star", "-n", 3, "--contrastive-k", 4, "--contrastive-alpha", 0.3)
    assert generate(place, *words, "--output", place / "sheet.png") == (0, "")
    with Image.open(place / "sheet.png") as picture:
        assert picture.width > 3 * 144 and picture.height > 2 * 144


def test_text_from_a_picture_and_editing(place, capfd):
    assert generate(place, "--image", place / "in.png", "--max-tokens", 5)[0] == 0
    assert generate(place, "--image", place / "in.png", "--prompt", "Describe it.", "--max-tokens", 5)[0] == 0
    assert len(capfd.readouterr().out.splitlines()) >= 2
    edit = ("--image", place / "in.png", "--prompt", "make it red", "--output", place / "edit.png")
    assert generate(place, *edit)[0] == 0 and (place / "edit.png").is_file()


def test_a_picture_is_framed_as_in_training(place, capfd):
    """cm3leon's pictures are always cut; a white border is Chameleon's."""
    generator = Generator.load(place / "hf")
    pixels = load_picture(place / "in.png", tiny_models.PIXELS, "crop")
    (wanted,) = generator.caption(pixels[None], temperature=1.0, seed=1, max_tokens=12)
    words = ("--image", place / "in.png", "--temperature", 1, "--seed", 1, "--max-tokens", 12)
    assert generate(place, *words) == (0, "") and wanted and wanted in capfd.readouterr().out
    asked = {"prompt": "What? Answer:", "after": "."}
    (wanted,) = generator.caption(pixels[None], temperature=1.0, seed=1, max_tokens=12, **asked)
    assert generate(place, *words, "--prompt", asked["prompt"], "--after", ".") == (0, "")
    assert wanted and wanted in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "expected --prompt and --output"),
        (("--prompt", "a"), 2, "expected --prompt and --output"),
        (("--prompt", "a", "--output", "bad.jpg"), 2, "ends in .png"),
        (("--prompt", "a", "--output", "bad.png", "--guidance", 3, "--contrastive-k", 2), 2, "exclude"),
        (("--prompt", "a", "--output", "bad.png", "--temperature", -1), 2, "temperature is -1"),
        (("--prompt", "a", "--output", "bad.png", "-n", 0), 2, "n is 0"),
        (("--prompt", "a", "--output", "bad.png", "--documents", 2), 2, "--bank"),
        (("--prompt", "a", "--output", "bad.png", "--bank", "nowhere"), 3, "nowhere does not exist"),
        (("--prompt", "red apple " * 60, "--output", "bad.png"), 3, "context is 96"),
        (("--prompt", "  ", "--output", "bad.png"), 3, "empty_text"),
        (("--image", "nowhere.png"), 3, "nowhere.png cannot be read"),
        (("--image", "{place}/text.png"), 3, "unknown_format"),
        (("--image", "{place}/in.png", "--output", "bad.png"), 2, "edits a picture"),
        (("--image", "{place}/in.png", "--bank", "nowhere"), 2, "--bank is for pictures"),
        (("--image", "{place}/in.png", "--contrastive-k", 4), 2, "--contrastive-k is for pictures"),
        (("--image", "{place}/in.png", "-n", 4), 2, "-n is for pictures"),
        (("--image", "{place}/in.png", "--max-tokens", 0), 2, "max_tokens is 0"),
        (
            ("--image", "{place}/in.png", "--prompt", "a", "--output", "bad.png", "--contrastive-k", 4),
            2,
            "exclude each other",
        ),
    ],
)
def test_refusals(place, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    found, line = generate(place, *(str(word).format(place=place) for word in arguments))
    assert found == code and message in line
    assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_where_there_is_none(place):
    code, line = generate(place, "--prompt", "a", "--output", "x.png", "--device", "cuda")
    assert code == 2 and "cuda" in line and "--device cpu" in line


def test_a_missing_model_is_a_checkpoint_error(tmp_path):
    code, line = run_tool("generate", "--model", tmp_path / "no", "--prompt", "a", "--output", tmp_path / "x.png")
    assert code == 4 and "does not exist" in line


def test_evaluate(place, capfd):
    assert run_tool("evaluate", "--model", place / "hf", "--task", "vqaa", "--input", "x") == (
        2,
        "--task vqaa is unknown; expected one of perplexity, fidelity, retrieval, fid, clip, recall, caption, vqa",
    )
    limited = ("--task", "caption", "--input", "x", "--limit", 0)
    assert run_tool("evaluate", "--model", place / "hf", *limited)[1].startswith("--limit 0; expected 1 or more")
    code, line = run_tool("evaluate", "--model", place / "hf", "--task", "perplexity", "--input", place / "none")
    assert code == 3 and "none" in line
    tars = TOOLS.parent / "examples" / "data" / "heldout-*.tar"
    words = ("--task", "fidelity", "--input", tars, "--count", 4, "--guidance", 1, 2, "--output", place / "f.json")
    assert run_tool("evaluate", "--model", place / "hf", *words) == (0, "")
    assert capfd.readouterr().out.count("fidelity ") == 2
    assert len(json.loads((place / "f.json").read_text())["measured"]) == 2
