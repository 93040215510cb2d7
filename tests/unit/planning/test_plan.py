"""Plans and suggestions: what is said to fit fits, in the order of derived time; the command and its refusals."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megacm3.errors import ConfigError
from megacm3.planning.counts import parameters
from megacm3.planning.plan import GB, GPUS, USABLE, describe, gpu, layouts, make_plan, suggest
from megacm3.planning.text import report
from megacm3.planning.traffic import Traffic
from megacm3.resolve import load_config
from tests.helpers.tools import run_tool

ROOT = Path(__file__).resolve().parents[3]
H100 = GPUS["h100-80g"]


def test_what_is_suggested_fits_and_is_the_fastest() -> None:
    config = load_config(None, ["model.preset=cm3leon_7b"])
    everything = list(layouts(config, 64, H100))
    assert any(not plan.fits(H100) for plan in everything)
    best = suggest(config, 64, H100)
    assert len(best) == 3
    for plan in best:
        assert all(stage.memory.total <= USABLE * 80 * GB for stage in plan.stages)
    times = [plan.step_seconds(H100) for plan in best]
    assert times == sorted(times)
    assert times[0] <= min(plan.step_seconds(H100) for plan in everything if plan.fits(H100)) + 1e-3


@pytest.mark.parametrize("preset, world", [("cm3leon_350m", 8), ("chameleon_7b", 32), ("chameleon_34b", 1024)])
def test_suggestions_can_be_given_to_the_trainer(preset: str, world: int) -> None:
    """Their text is a list of overrides that make the same plan."""
    plan = suggest(load_config(None, [f"model.preset={preset}"]), world, H100, count=1)[0]
    again = make_plan(load_config(None, [f"model.preset={preset}", *describe(plan).split()]), world)
    assert again.layout == plan.layout and again.stages == plan.stages


EXAMPLES = [path for path in sorted((ROOT / "examples" / "configs").glob("*_[0-9]*.yaml")) if "sweep" not in path.stem]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_configs_fit_what_they_say(path: Path) -> None:
    """GPUs of 80 GB: a node of 8, for Chameleon 34B four of them and no fewer."""
    config = load_config(path)
    nodes = 4 if "34b" in path.stem else 1
    assert make_plan(config, 8 * nodes).fits(GPUS["a100-80g"])
    assert nodes == 1 or not make_plan(config, 8).fits(GPUS["a100-80g"])


def test_too_few_gpus_say_what_is_missing() -> None:
    config = load_config(None, ["model.preset=chameleon_34b"])
    with pytest.raises(
        ConfigError, match=r"does not fit 2 x a100-40g: .* needs \d+\.\d of 36\.8 GiB a GPU; raise --gpus"
    ):
        suggest(config, 2, gpu("a100-40g"))
    with pytest.raises(ConfigError, match="no legal layout for 7 GPUs"):
        suggest(config, 7, H100)
    with pytest.raises(ConfigError, match="--gpu h100; expected one of a100-40g, a100-80g, h100-80g"):
        gpu("h100")


def test_more_memory_is_never_slower() -> None:
    config = load_config(None, ["model.preset=chameleon_7b"])
    small, large = replace(H100, memory=40 * GB), replace(H100, memory=140 * GB)
    assert suggest(config, 64, large)[0].step_seconds(large) <= suggest(config, 64, small)[0].step_seconds(small)


def test_rings() -> None:
    """What a ring of n ranks sends: 2 (n-1)/n of an all-reduced tensor, (n-1)/n of a gathered or scattered one."""
    assert Traffic("data", "all_reduce", 1, 800, 8).sent == 1400
    assert Traffic("data", "all_gather", 1, 800, 8).sent == 700
    assert Traffic("data", "reduce_scatter", 1, 800, 8).sent == 700
    assert Traffic("pipeline", "send", 1, 800, 2).sent == 800


def test_the_report_has_every_figure() -> None:
    config = load_config(
        None,
        ["model.preset=chameleon_34b", "parallel.tensor=8", "parallel.pipeline=4", "parallel.sequence=true"],
    )
    text = report(make_plan(config, 1024), H100)
    assert f"{parameters(config.model):,} parameters" in text and "34,293,448,704" in text
    for word in ("bubble 3.0%", "activations", "all_gather", "send", "derived, not measured", "h100-80g"):
        assert word in text, word


def test_the_command() -> None:
    words = "--preset tiny_cm3leon --gpus 4 --gpu a100-80g --tensor 2 --pipeline 2 --zero 1 --sequence --dry-run"
    command = [sys.executable, "tools/plan.py", *words.split()]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert "dry run: 4 distinct ranks of 4" in found.stdout
    rows = re.findall(r"\b(yes|NO)$", found.stdout, re.MULTILINE)
    assert rows == ["yes", "yes"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--preset", "chameleon_34b", "--gpus", "12", "--tensor", "8"), ("12 processes", "multiple of 8")),
        (("--preset", "chameleon_34b", "--gpus", "64", "--tensor", "16"), ("parallel.tensor = 16", "kv_heads = 8")),
        (("--preset", "chameleon", "--gpus", "8"), ("'chameleon'", "chameleon_7b")),
        (("--preset", "chameleon_7b", "--gpus", "0"), ("--gpus 0", "at least 1")),
    ],
    ids=str,
)
def test_the_command_refuses_in_one_line(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    code, message = run_tool("plan", *arguments)
    assert code == 2 and all(word in message for word in words), message


def test_a_zero_stage_that_pipelines_cannot_have_shows_the_legal_table() -> None:
    config = load_config(None, ["model.preset=chameleon_34b", "parallel.pipeline=4", "deepspeed=ds_configs/zero3.json"])
    with pytest.raises(ConfigError, match="ZeRO stage 3"):
        make_plan(config, 64)
    with pytest.raises(ConfigError, match="Legal:"):
        make_plan(config, 64)
