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
