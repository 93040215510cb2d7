"""What every command line owes somebody who types something wrong: one line, a code of the contract, at once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megacm3.errors import ConfigError
from megacm3.files import check_output
from megacm3.resolve import load_config
from megacm3.tokenizers.image import torch_device
from tests.helpers.tools import run_tool

ROOT = Path(__file__).resolve().parents[2]
TOOLS = sorted((ROOT / "tools").glob("*.py")) + sorted((ROOT / "examples").glob("*.py"))
HEAVY = "{'torch', 'transformers', 'faiss', 'diffusers', 'deepspeed'} & set(sys.modules)"


def typed(path: Path, *arguments: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script as a user runs it, without this checkout on the path."""
    words = ["bash"] if path.suffix in (".sh", ".sbatch") else [sys.executable]
    given = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    return subprocess.run(
        [*words, str(path), *arguments], cwd=folder, env=given, capture_output=True, text=True, timeout=120
    )


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Its last line is the one error line, which has the words."""
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1 and all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_help_and_an_unknown_flag_from_another_folder_load_nothing_heavy(tool: Path, tmp_path: Path) -> None:
    code = f"import atexit, runpy, sys\natexit.register(lambda: print('heavy:', {HEAVY}))\n"
    code += "sys.argv, sys.path[0] = sys.argv[1:], sys.argv[1].rpartition('/')[0]\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    (tmp_path / "ask.py").write_text(code)
    shown = typed(tmp_path / "ask.py", str(tool), "--help", folder=tmp_path)
    assert shown.returncode == 0 and "usage: " in shown.stdout and "heavy: set()" in shown.stdout, shown.stderr
    wrong = typed(tmp_path / "ask.py", str(tool), "--no-such-flag", folder=tmp_path)
    refused(wrong, 2)
    assert "heavy: set()" in wrong.stdout
    for named in re.findall(r"(?:examples|megacm3|tools)/[\w/.]+\.\w+", shown.stdout):
        assert (ROOT / named).is_file(), named
    assert os.listdir(tmp_path) == ["ask.py"]


def test_a_tool_uses_the_checkout_that_it_lies_in(tmp_path: Path) -> None:
    """Also where the environment was made for another one."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "megacm3").mkdir()
    (tmp_path / "megacm3" / "__init__.py").write_text("raise SystemExit('this checkout')")
    for tool in (ROOT / "tools").glob("*.py"):
        (tmp_path / "tools" / tool.name).write_text(tool.read_text())
        assert "this checkout" in typed(tmp_path / "tools" / tool.name, "--help").stderr, tool.name


@pytest.mark.parametrize("name", ["make_data", "make_sft_data"])
def test_a_source_of_another_kind(name: str, tmp_path: Path) -> None:
    pairs = ROOT / "examples" / "data" / "heldout-00000.tar"
    for source, word in ((tmp_path / "no.tar", "No such file"), (Path(__file__), "cannot be read"), (pairs, "json")):
        done = typed(ROOT / "examples" / f"{name}.py", "--source", str(source), "--output", str(tmp_path / "out"))
        refused(done, 3, f"--source {source}", word)
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code = "from megacm3.command import run\nfrom pathlib import Path\nimport sys\n"
    (tmp_path / "ask.py").write_text(code + "run(lambda _: Path(sys.argv[1], 'x').write_text('y') and 0)")
    done = typed(tmp_path / "ask.py", str(tmp_path / "file"), PYTHONPATH=str(ROOT))
    refused(done, 3, f"{tmp_path}/file/x: Not a directory")


def test_the_recipes_say_how_they_are_used() -> None:
    scripts = [ROOT / "examples" / name for name in ("pretrain.sh", "pretrain.sbatch", "quickstart.sh", "sft.sh")]
    for script in [*scripts, ROOT / "examples" / "retrieval_gain.sh"]:
        shown = typed(script, "--help")
        assert shown.returncode == 0 and f"examples/{script.name} " in shown.stdout and not shown.stderr, script


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANKS": "all"}, "RANKS=all"),
        ({"RANKS": "0"}, "RANKS=0"),
        ({"RANKS": "2", "RESTARTS": "-1"}, "RESTARTS=-1"),
        ({"HOSTFILE": "nowhere"}, "HOSTFILE=nowhere cannot be read"),
        ({"PATH": "/usr/bin:/bin"}, "source .venv/bin/activate"),
    ],
)
def test_a_recipe_called_wrongly(variables: dict[str, str], words: str) -> None:
    done = typed(ROOT / "examples" / "pretrain.sh", "examples/configs/cm3leon_7b.yaml", **variables)
    refused(done, 2, words)


def test_a_slurm_script_outside_slurm() -> None:
    config, script = "examples/configs/cm3leon_7b.yaml", ROOT / "examples" / "pretrain.sbatch"
    refused(typed(script, config), 2, "sbatch")
    refused(typed(script, config, DRY_RUN="1"), 2, "SLURM_NTASKS")
    refused(typed(script), 2, "no config given")


def blocked(tmp_path: Path) -> list[tuple[str, str]]:
    """Outputs that can never be made, and what is said about them."""
    (tmp_path / "file").write_text("")
    return [("", "is empty"), (str(tmp_path / "file" / "x.png"), f"{tmp_path}/file is a file")]


OUTPUTS: dict[str, list[str]] = {
    "build_memory_bank": ["--store", "s", "--encoder", "e", "--input", "i"],
    "compare_models": ["--base", "b", "--tuned", "t", "--store", "s"],
    "convert_checkpoint": ["reshard", "--checkpoint", "c"],
    "convert_image_tokenizer": ["--weights", "w", "--config", "c"],
    "evaluate": ["--model", "m", "--task", "perplexity", "--input", "i"],
    "find_neighbours": ["--bank", "b"],
    "generate": ["--model", "m", "--prompt", "p"],
    "pretokenize": ["--input", "i", "--text-tokenizer", "t", "--image-tokenizer", "v"],
    "train_image_tokenizer": ["--input", "i"],
    "train_retriever": ["--input", "i"],
    "train_text_tokenizer": ["--input", "i", "--vocab-size", "300"],
    "view_data": ["s"],
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_cannot_be_made_is_said_before_the_work(name: str, tmp_path: Path) -> None:
    for output, words in blocked(tmp_path):
        code, line = run_tool(name, *OUTPUTS[name], "--output", output)
        assert code == 2 and "--output" in line and words in line, line


def test_an_output_that_is_a_folder_or_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").mkdir()
    with pytest.raises(ConfigError, match="is a folder; expected the name of a file"):
        check_output(tmp_path / "x.png", file=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    with pytest.raises(ConfigError, match=r"--report .*no right to write"):
        check_output(tmp_path / "deep" / "er", "--report")


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99"])
def test_a_device_that_is_none(device: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--device {device}"):
        torch_device(device)
    pairs = ROOT / "examples" / "data" / "heldout-00000.tar"
    code, line = run_tool("train_retriever", "--input", pairs, "--output", tmp_path / "e", "--device", device)
    assert code == 2 and f"--device {device}" in line and not (tmp_path / "e").exists()


@pytest.mark.parametrize("flags", [["--lr", "nan"], ["--image-layers", "0"], ["--vocabulary", "1000000000000"]])
def test_sizes_of_an_encoder(flags: list[str], tmp_path: Path) -> None:
    pairs = ROOT / "examples" / "data" / "heldout-00000.tar"
    code, line = run_tool("train_retriever", "--input", pairs, "--output", tmp_path / "e", *flags)
    assert code == 2 and not (tmp_path / "e").exists(), line


@pytest.mark.parametrize("flags", [["--vocab-size", "1000000000000"], ["--vocab-size", "300", "--max-lines", "-1"]])
def test_numbers_that_sentencepiece_cannot_take(flags: list[str], tmp_path: Path) -> None:
    code, line = run_tool("train_text_tokenizer", "--input", ROOT / "README.md", "--output", tmp_path / "t", *flags)
    assert code == 2 and flags[-2] in line and flags[-1] in line, line


WRONG_KEYS = (
    *("optimizer.lr=-1", "optimizer.lr=.nan", "optimizer.clip=-1", "optimizer.betas=[0.9,1]", "optimizer.betas={a: 1}"),
    *("train.stop_at=-1", "checkpoint.keep=-1", "data.workers=-1", "model.qk_norm_groups=0", "model.norm_eps=0"),
    *("model.preset=[1]", "data.mixture={a: 1}", "guards.spike=.nan", "watchdog.timeout=-1", "objective.spans=-2"),
)


@pytest.mark.parametrize("key", WRONG_KEYS)
def test_a_wrong_value_of_a_key(key: str) -> None:
    with pytest.raises(ConfigError, match=key.partition("=")[0].replace(".", r"\.")):
        load_config(ROOT / "examples" / "configs" / "quickstart.yaml", [key])


def test_a_config_that_is_a_folder() -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(ROOT / "examples")


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_ctrl_c_while_the_workers_server_imports_says_nothing(tmp_path: Path) -> None:
    code = "import multiprocessing.forkserver as server, os, signal, sys, time\n"
    code += f"sys.path.insert(0, {str(ROOT)!r})\nfrom megacm3.data.executors import _SLOW_IMPORTS\n"
    code += "server.set_forkserver_preload(list(_SLOW_IMPORTS))\nserver.ensure_running()\ntime.sleep(1.8)\n"
    code += "os.kill(server._forkserver._forkserver_pid, signal.SIGINT)\ntime.sleep(0.5)"
    (tmp_path / "ask.py").write_text(code)
    done = typed(tmp_path / "ask.py", PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and done.stderr == "", done.stderr
