"""Every command block of the README runs, on what the quickstart makes with its small budget."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.+?)```", README, flags=re.DOTALL)
QUICKSTART, TESTS = "bash examples/quickstart.sh", "bash tests/run.sh"
TUNING, GAIN = "bash examples/sft.sh", "bash examples/retrieval_gain.sh"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a space in its name that is this checkout by links, but for its own `runs`."""
    folder = tmp_path_factory.mktemp("a checkout")
    for path in ROOT.iterdir():
        if path.name not in ("runs", ".git", ".venv"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(environment_folder())
    return folder


@pytest.fixture(scope="module")
def quickstart(checkout: Path) -> Path:
    """What the quickstart of small budget leaves."""
    found = shell(f"{QUICKSTART} --budget small", checkout, timeout=1500)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-6000:]
    return checkout / "runs" / "quickstart"


def shell(command: str, checkout: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """The command as a user types it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name in ("PYTHONPATH", "MEGACM3_VENV", "MEGACM3_RUNS"):
        environment.pop(name, None)
    return subprocess.run(
        ["bash", "-e", "-c", command], cwd=checkout, env=environment, capture_output=True, text=True, timeout=timeout
    )


def environment_folder() -> str:
    """The environment that these tests run in."""
    return os.environ.get("VIRTUAL_ENV", str(ROOT / ".venv"))


def test_the_two_commands_come_first() -> None:
    assert [block.strip() for block in BLOCKS[:2]] == [QUICKSTART, TESTS]


def test_files_that_the_readme_names_exist() -> None:
    named = re.findall(r"[`( /](?:(?:examples|tools|tests|ds_configs|megacm3)/[\w./*-]+)", README)
    named += re.findall(r"!\[.*?\]\((.+?)\)", README)
    for name in {name.strip("`( ").rstrip(".,:;") for name in named}:
        assert list(ROOT.glob(name)), f"README names {name}"


@pytest.mark.timeout(1800)
def test_the_quickstart_leaves_what_the_contract_says(quickstart: Path) -> None:
    for name in ("text_tokenizer", "image_tokenizer", "encoder", "store", "bank", "neighbours"):
        assert (quickstart / name / "manifest.json").is_file(), name
    for name in ("hf/config.json", "report.html", "samples.png", "timings.jsonl", "train/metrics.jsonl"):
        assert (quickstart / name).is_file(), name
    steps = sorted(path.parent.name for path in (quickstart / "train" / "checkpoints").glob("step_*/manifest.json"))
    assert steps == ["step_000008", "step_000010"]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "number",
    [pytest.param(n, marks=[pytest.mark.long] * (TUNING in block)) for n, block in enumerate(BLOCKS) if n],
)
def test_every_block_runs(quickstart: Path, checkout: Path, number: int) -> None:
    command = BLOCKS[number].replace(TESTS, f"{TESTS} --collect-only -qq")
    for script in (TUNING, GAIN):
        command = command.replace(script, f"{script} --budget small")
    if number > 2:  # the third block enters the environment
        command = f"source .venv/bin/activate\n{command}"
    found = shell(command, checkout)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-6000:]
    assert "Traceback" not in found.stderr


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_quickstart_again_makes_nothing_anew(quickstart: Path, checkout: Path) -> None:
    timings = (quickstart / "timings.jsonl").read_bytes()
    weights = (quickstart / "hf" / "model.safetensors").read_bytes()
    found = shell(f"{QUICKSTART} --budget small", checkout, timeout=1500)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-6000:]
    assert found.stdout.count("was there already") == 12
    assert (quickstart / "timings.jsonl").read_bytes() == timings
    assert (quickstart / "hf" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    "arguments, words",
    [("--budget tiny", "full or small"), ("--outptu x", "--outptu"), ("--output", "needs a value")],
)
def test_wrong_arguments_are_one_line_and_code_2(checkout: Path, arguments: str, words: str) -> None:
    for script in (QUICKSTART, TUNING, GAIN):
        found = shell(f"{script} {arguments}", checkout)
        assert found.returncode == 2 and words in found.stderr, found.stderr


@pytest.mark.parametrize("script", [TUNING, GAIN])
def test_what_needs_a_quickstart_says_what_to_run(checkout: Path, script: str) -> None:
    found = shell(f"{script} --quickstart nowhere", checkout)
    assert found.returncode == 2 and f"{QUICKSTART} --output" in found.stderr, found.stderr
