"""tools/convert_checkpoint.py: what it prints, and what it refuses."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.checkpoints import assert_holds, tiny, write_random
from tests.helpers.tools import run_tool
from tests.unit.convert.conftest import assert_byte_equal

Folders = Callable[[str], Path]


def test_there_and_back(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native, back = tmp_path / "native", tmp_path / "back"
    arguments = ("--model", folders("llama"), "--output", native, "--tensor", 2, "--pipeline", 2)
    assert run_tool("convert_checkpoint", "from-hf", *arguments) == (0, "")
    assert run_tool("convert_checkpoint", "to-hf", "--checkpoint", native, "--output", back) == (0, "")
    assert_byte_equal(folders("llama"), back)
    # DeepSpeed says on stdout which accelerator it found when something imports it for the first time.
    said = [line for line in capsys.readouterr().out.splitlines() if "accelerator" not in line]
    assert said[0].startswith(f"{native}: tensor 2 x pipeline 2, in ") and said[2].startswith(
        f"{back}: step 0 of {native}, "
    )
    assert all(line.startswith("logits equal the trainer's: largest difference ") for line in (said[1], said[3]))
    again = run_tool("convert_checkpoint", "to-hf", "--checkpoint", native, "--output", back)
    assert again[0] == 3 and "exists already" in again[1]
    assert (
        run_tool("convert_checkpoint", "to-hf", "--checkpoint", native, "--output", back, "--overwrite", "--no-gate")[0]
        == 0
    )
    assert "the logits were not compared (--no-gate)" in capsys.readouterr().out


def test_reshard_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step, output = tmp_path / "run" / "checkpoints" / "step_000007", tmp_path / "other" / "checkpoints" / "step_000007"
    tensors = write_random(tiny("tiny_chameleon_34b"), step)
    arguments = ("--checkpoint", tmp_path / "run", "--output", output, "--tensor", 4, "--pipeline", 2)
    assert run_tool("convert_checkpoint", "reshard", *arguments) == (0, "")
    assert_holds(output, tensors)
    assert "tensor 1 x pipeline 1 x data 1, ZeRO 0 -> tensor 4 x pipeline 2" in capsys.readouterr().out
    assert run_tool("convert_checkpoint", "inspect", "--checkpoint", tmp_path / "other", "--verify") == (0, "")
    said = capsys.readouterr().out
    assert "tiny_chameleon_34b: 4 layers x 64" in said and "param bfloat16, master float32, exp_avg float32" in said
    assert "layers.3.attn.q.weight                   [64, 64] in 4 boxes" in said


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (("to-hf", "--checkpoint", "nowhere", "--output", "out"), 4, "nowhere does not exist"),
        (
            ("from-hf", "--model", "nowhere", "--output", "out"),
            4,
            "nowhere does not exist; expected a Hugging Face folder",
        ),
        (("reshard", "--checkpoint", ".", "--output", "out"), 4, "holds no valid checkpoint step"),
        (("reshard", "--checkpoint", ".", "--output", "out", "--tensor", "0"), 2, "--tensor 0; expected at least 1"),
        (("to-hf", "--checkpoint", ".", "--output", "out", "--max-shard-size", "inf"), 2, "--max-shard-size inf"),
    ],
)
def test_refusals(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found, said = run_tool("convert_checkpoint", *arguments)
    assert (found, message in said) == (code, True), said
    assert not (tmp_path / "out").exists()
