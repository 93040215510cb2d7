"""The CUDA shims: there where CUDA is not, inert where it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megacm3.errors import ConfigError
from megacm3.parallel.cpu import choose_device, prepare

ROOT = Path(__file__).resolve().parents[3]


def test_inert_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    before = torch.cuda.current_device
    prepare(torch.device("cuda", 0))
    assert torch.cuda.current_device is before and "DS_ACCELERATOR" not in os.environ


def test_names_the_accelerator_before_deepspeed_is_imported() -> None:
    program = (
        "import torch; from megacm3.parallel.cpu import prepare; prepare(torch.device('cpu'));"
        "from deepspeed.accelerator import get_accelerator; print(get_accelerator()._name, torch.cuda.current_device())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["cpu", "cpu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there() -> None:
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"train\.device = cuda.*train\.device=cpu"):
        choose_device("cuda")


@pytest.mark.parametrize("file", sorted((ROOT / "megacm3").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_else_patches_cuda(file: Path) -> None:
    if file != ROOT / "megacm3" / "parallel" / "cpu.py":
        assert "torch.cuda.current_device =" not in file.read_text(encoding="utf-8")
