"""The recipes' configs load, and fit the machines that their first lines name."""

import re
from pathlib import Path

import pytest

from megacm3.presets import PRESETS
from megacm3.resolve import load_config
from megacm3.train import check_launch

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
RECIPES = [path for path in CONFIGS if path.stem in PRESETS]


def test_every_preset_but_the_tiny_ones_has_a_recipe() -> None:
    assert {path.stem for path in RECIPES} == {name for name in PRESETS if not name.startswith("tiny_")}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_its_machines(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    assert config.model.preset == path.stem and config.train.out == f"runs/{path.stem}"
    nodes = re.search(r"at least (\d+) nodes", path.read_text().partition("\n")[0])
    smallest = 8 * int(nodes.group(1)) if nodes else 8
    for gpus in (smallest, 4 * smallest):
        check_launch(config, gpus)


@pytest.mark.parametrize("name", ["cm3leon_7b", "chameleon_7b"])
def test_fine_tuning_recipes_fit_their_machines_and_begin_with_the_pretraining_recipe(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    tuning, base = (load_config(ROOT / f"examples/configs/{prefix}{name}.yaml") for prefix in ("sft_", ""))
    assert tuning.checkpoint.init == base.train.out and tuning.model.preset == base.model.preset
    assert tuning.data.packing == "whole" and len({entry.store for entry in tuning.data.mixture}) >= 6
    for gpus in (8, 64):
        check_launch(tuning, gpus)
    # [CM3Leon] table 4; [Chameleon] 4.1
    wanted = {"cm3leon_7b": (5e-5, 512, 0.0, "all", "cm3"), "chameleon_7b": (1e-5, 128, 0.05, "answers", "causal")}
    found = (tuning.optimizer.lr, tuning.train.global_batch, tuning.model.dropout)
    assert (*found, tuning.objective.loss_on, tuning.objective.kind) == wanted[name]


def test_the_papers_grid_of_rates_and_batches_is_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna", reason="the extra sweep")
    from megacm3.training.sweep import load_sweep

    monkeypatch.chdir(ROOT)
    for path in (ROOT / "examples" / "configs").glob("sweep_*.yaml"):
        sweep = load_sweep(path, {})
        recipe = re.search(r"examples/configs/\S+\.yaml", sweep.commands[0])
        assert recipe is not None and recipe[0] in [str(config.relative_to(ROOT)) for config in CONFIGS]
        for key, values in sweep.keys.items():
            for value in values:
                load_config(ROOT / recipe[0], [f"{key}={value}", *(f"{k}={v}" for k, v in sweep.fixed.items())])
    grid = load_sweep(ROOT / "examples/configs/sweep_sft_cm3leon_7b.yaml", {})
    assert list(grid.keys["optimizer.lr"]) == [1e-5, 3e-5, 5e-5, 1e-4] and len(grid.keys["train.global_batch"]) == 3
