"""The room's command lines: help at once, results in words, one clear line and the right exit code for bad input."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.tools import TOOLS, run_tool
from tests.unit.retrieval.conftest import flip, same_bytes
from tests.unit.retrieval.makers import drawing

NAMES = ("train_retriever", "build_memory_bank", "find_neighbours", "search_memory_bank")


@pytest.mark.parametrize("name", NAMES)
def test_help_loads_nothing_heavy(name):
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'faiss', 'transformers', 'pyarrow', 'PIL'} & set(sys.modules)"
    )
    started = time.process_time()
    ended = subprocess.run([sys.executable, "-c", code, str(TOOLS / f"{name}.py")], capture_output=True, text=True)
    assert ended.returncode == 0 and "usage:" in ended.stdout, ended.stderr
    assert time.process_time() - started < 1


def test_the_way_from_pairs_to_neighbours(made, tmp_path, capsys):
    encoder = ["--image-size", 16, "--width", 32, "--image-layers", 1, "--text-layers", 1, "--vocabulary", 600]
    encoder = ["--input", made.inputs, "--output", tmp_path / "encoder", *encoder, "--steps", 2, "--batch", 16]
    bank = ["--store", made.store, "--input", made.inputs, "--encoder", made.encoder, "--output", f"{tmp_path}/bank/"]
    bank += ["--shard-size", 20]
    near = ["--bank", tmp_path / "bank", "--encoder", made.encoder, "--output", tmp_path / "n"]
    near += ["--block", 20, "--search", 32, "--keep", 8, "--duplicate", 0.999]
    said = {
        "train_retriever": "50 pairs",
        "build_memory_bank": "50 of 55 documents",
        "find_neighbours": "50 with candidates",
    }
    for name, arguments in (("train_retriever", encoder), ("build_memory_bank", bank), ("find_neighbours", near)):
        assert run_tool(name, *arguments) == (0, "")
        first = capsys.readouterr().out
        assert said[name] in first and "finished already" not in first
        assert run_tool(name, *arguments) == (0, "")
        assert "finished already" in capsys.readouterr().out
    assert same_bytes(tmp_path / "bank", made.bank) and same_bytes(tmp_path / "n", made.neighbours)
    assert run_tool("verify_data", tmp_path / "bank") == run_tool("verify_data", tmp_path / "n") == (0, "")


def test_searching_by_text_and_by_picture(made, tmp_path, capsys):
    assert run_tool("search_memory_bank", "--bank", made.bank, "--text", "a green cross on white", "-k", 3) == (0, "")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "green" in "".join(lines)
    (tmp_path / "query.webp").write_bytes(drawing("blue", "frame"))
    arguments = ["--image", tmp_path / "query.webp", "--input", made.inputs, "--output", tmp_path / "hits.png"]
    assert run_tool("search_memory_bank", "--bank", made.bank, *arguments) == (0, "")
    lines = capsys.readouterr().out.splitlines()
    assert "frame" in "".join(lines[:3]) and lines[-1] == f"drawn: {tmp_path / 'hits.png'}"
    with Image.open(tmp_path / "hits.png") as sheet:
        assert sheet.width > 800 and len(sheet.convert("RGB").getcolors(1 << 20) or []) > 20
    assert run_tool("search_memory_bank", "--bank", made.bank, "--text", "bar", "-k", 99) == (0, "")
    assert len(capsys.readouterr().out.splitlines()) == 50


@pytest.mark.parametrize(
    ("name", "arguments", "code", "message"),
    [
        ("search_memory_bank", ["--bank", "BANK", "--text", "x", "-k", 0], 2, "k = 0"),
        ("search_memory_bank", ["--bank", "BANK", "--text", "x", "--output", "x.png"], 2, "--input"),
        ("search_memory_bank", ["--bank", "BANK", "--image", "nothing.png"], 3, "nothing.png cannot be read"),
        ("search_memory_bank", ["--bank", "nothing", "--text", "x"], 3, "nothing does not exist"),
        ("find_neighbours", ["--bank", "STORE", "--output", "OUT"], 3, "expected 'bank'"),
        ("find_neighbours", ["--bank", "BANK", "--output", "OUT", "--query-dropout", 2], 2, "--query-dropout 2"),
        ("build_memory_bank", ["--store", "STORE", "--encoder", "ENCODER", "--output", "OUT"], 2, "--input is needed"),
        (
            "build_memory_bank",
            ["--store", "BANK", "--input", "INPUT", "--encoder", "x", "--output", "OUT"],
            3,
            "expected 'store'",
        ),
        ("train_retriever", ["--input", "nothing*.tar", "--output", "OUT"], 3, "matches no file"),
        ("train_retriever", ["--input", "INPUT", "--output", "OUT", "--image-size", 30], 2, "multiple of the patch"),
        ("train_retriever", ["--input", "INPUT", "--output", "OUT", "--base", "STORE"], 3, "lacks config.json"),
    ],
)
def test_bad_input(made, tmp_path, monkeypatch, name, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    paths = {
        "BANK": made.bank,
        "STORE": made.store,
        "ENCODER": made.encoder,
        "INPUT": made.inputs,
        "OUT": tmp_path / "out",
    }
    found = run_tool(name, *(paths.get(word, word) for word in arguments))
    assert found[0] == code and message in found[1], found
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_bank_ends_with_one_line(made, copy):
    folder = copy(made.bank)
    flip(folder / "index" / "shard-00000-of-00003.faiss")
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, root / "tools" / "verify_data.py", folder]
    ended = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    assert ended.returncode == 3 and len(lines) == 1 and lines[0].startswith("error: ") and "damaged" in lines[0]
