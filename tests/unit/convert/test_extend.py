"""More ids than the folder has."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megacm3.checkpoint.boxes import whole
from megacm3.checkpoint.reader import Checkpoint
from megacm3.convert.from_hf import opened
from megacm3.convert.to_hf import Export, to_hf
from megacm3.convert.verify import TOLERANCE, compare, trainer_logits
from megacm3.errors import ConfigError
from tests.unit.convert.conftest import import_hf, tensors

Folders = Callable[[str], Path]


@pytest.mark.parametrize("kind", ["opt", "qwen3"])
def test_new_rows_are_average_and_old_logits_stay(kind: str, folders: Folders, tmp_path: Path) -> None:
    native = Checkpoint(import_hf(folders(kind), tmp_path / "native", 2, 1, extend_vocab=10))
    assert native.shapes["embed.weight"] == (310, 32)
    old = tensors(folders(kind))
    for logical, name in (("embed.weight", "embed_tokens.weight"), ("head.weight", "lm_head.weight")):
        if logical not in native.shapes:
            continue
        rows = torch.empty(310, 32)
        native.read("param", logical, whole((310, 32)), rows)
        before = next(value for key, value in old.items() if key.endswith(name))
        assert torch.equal(rows[:300], before)
        away = (rows[300:] - before.mean(0)) / before.std(0)
        assert 0.01 < away.std() < 0.03 and len(rows[300:].unique(dim=0)) == 10
    export = Export.of(native.folder)
    with opened(folders(kind), tmp_path / "x") as source:
        assert compare(native, export.config, folders(kind), source).largest < TOLERANCE
    (logits,) = trainer_logits(native, export.config, [torch.randint(0, 300, (1, 64))])
    share = logits.softmax(-1)[..., 300:].sum(-1).mean()
    assert share < 10 / 310  # average logits take less than an even share
    back = to_hf(export, tmp_path / "back", gate=lambda f: _gate(export, f))
    assert next(v for k, v in tensors(back).items() if k.endswith("embed_tokens.weight")).shape == (310, 32)


def _gate(export: Export, folder: Path) -> None:
    assert compare(export.checkpoint, export.config, folder).largest < TOLERANCE


def test_a_count_below_one(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--extend-vocab -3; expected the number of ids to add"):
        import_hf(folders("opt"), tmp_path / "native", extend_vocab=-3)
