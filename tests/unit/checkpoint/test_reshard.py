import gc
import json
import sys
from pathlib import Path

import pytest
import torch

from megacm3.checkpoint import reshard as module
from megacm3.checkpoint.boxes import Box
from megacm3.checkpoint.reader import Checkpoint
from megacm3.checkpoint.reshard import find_step, plan, reshard
from megacm3.checkpoint.tensors import read_header
from megacm3.convert.benchmark import anonymous_bytes, measured
from megacm3.errors import CheckpointError, ConfigError, DataError
from tests.helpers.checkpoints import assert_holds, tiny, write_random


@pytest.mark.parametrize("preset", ["tiny_cm3leon", "tiny_chameleon_34b", "tiny_modern"])
def test_every_layout_holds_the_same(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4096)  # many chunks a tensor
    source = tmp_path / "source"
    tensors = write_random(tiny(preset), source)
    for tensor, pipeline in ((1, 1), (2, 1), (1, 4), (2, 2)):
        output = tmp_path / f"{tensor}{pipeline}"
        reshard(source, output, tensor, pipeline)
        assert_holds(output, tensors)
        assert len(list(output.glob("rank_*.safetensors"))) == tensor * pipeline
        again = Checkpoint(reshard(output, tmp_path / f"{tensor}{pipeline}-back", 1, 1))
        assert again.config == Checkpoint(source).config and again.state == {"step": 7} and again.optimizer_step == 7


def test_a_vocabulary_that_does_not_divide(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tensors = write_random(tiny("tiny_modern", vocab_size=509), source)
    assert_holds(reshard(source, tmp_path / "a", 2, 1), tensors)
    assert {str(box) for box, _ in Checkpoint(tmp_path / "a").boxes("param", "head.weight")} == {
        "0:255,0:64",
        "255:509,0:64",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_by_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of 128 MiB in each of four kinds, three of them in fp32, in chunks of 1 MiB: never half of one."""
    monkeypatch.setattr(module, "CHUNK", 1 << 20)
    source, timings = tmp_path / "source", []
    write_random(tiny("tiny_cm3leon", vocab_size=1 << 19), source)
    gc.collect()
    before = anonymous_bytes()
    with measured("reshard", timings):
        reshard(source, tmp_path / "out", 2, 1)
    assert (tmp_path / "out/rank_00001.safetensors").stat().st_size > 200 << 20
    assert timings[0].peak_bytes - before < 64 << 20


def test_files_hold_what_their_rank_runs() -> None:
    shapes = {
        "embed.weight": (512, 64),
        "positions.weight": (32, 64),
        "layers.0.attn.q.weight": (64, 64),
        "layers.1.attn.o.weight": (64, 64),
        "layers.1.attn.q_norm.weight": (1, 16),
        "final_norm.weight": (64,),
    }
    first, second, third, fourth = plan(shapes, 2, 2, 2)
    assert first == [
        ("embed.weight", Box((0, 0), (256, 64))),
        ("positions.weight", Box((0, 0), (32, 64))),
        ("layers.0.attn.q.weight", Box((0, 0), (32, 64))),
    ]
    assert second == [("embed.weight", Box((256, 0), (256, 64))), ("layers.0.attn.q.weight", Box((32, 0), (32, 64)))]
    assert [name for name, _ in third] == ["layers.1.attn.o.weight", "layers.1.attn.q_norm.weight", "final_norm.weight"]
    assert fourth == [("layers.1.attn.o.weight", Box((0, 32), (64, 32)))]


def test_layouts_that_the_model_does_not_have(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_random(tiny("tiny_modern"), source)
    with pytest.raises(ConfigError, match=r"parallel.tensor = 4 is more than model.kv_heads = 2"):
        reshard(source, tmp_path / "a", 4, 1)
    with pytest.raises(ConfigError, match=r"model.layers = 4 is not divisible by parallel.pipeline = 3"):
        reshard(source, tmp_path / "a", 1, 3)
    assert not (tmp_path / "a").exists()


def test_a_damaged_source_or_a_taken_output(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_random(tiny("tiny_modern"), source)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    with pytest.raises(DataError, match="exists already"):
        reshard(source, tmp_path / "taken", 1, 1)
    file = source / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors is damaged: sha256"):
        reshard(source, tmp_path / "a", 1, 1)
    assert not (tmp_path / "a").exists() and not list(tmp_path.glob(".a*"))


def test_find_step(tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step_000007"
    write_random(tiny("tiny_modern"), step)
    assert find_step(tmp_path / "run") == find_step(step.parent) == find_step(step) == step
    with pytest.raises(CheckpointError, match="does not exist; give a run's folder"):
        find_step(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no valid checkpoint step"):
        find_step(tmp_path)


def test_boxes_that_do_not_cover_a_tensor(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_random(tiny("tiny_modern"), source)
    checkpoint, name = Checkpoint(reshard(source, source.parent / "two", 2, 1)), "layers.1.mlp.up.weight"
    checkpoint.boxes("exp_avg", name).pop()
    with pytest.raises(CheckpointError, match=rf"exp_avg of {name} has 4096 elements in its boxes; expected 8192"):
        checkpoint.check_coverage()
    with pytest.raises(
        CheckpointError, match=rf"exp_avg of {name} lacks part of \[0:128,0:64\]: 4096 of 8192 elements"
    ):
        checkpoint.read("exp_avg", name, Box((0, 0), (128, 64)), torch.empty(128, 64))


def test_the_manifest_speaks_for_itself(tmp_path: Path) -> None:
    """No pickle anywhere: JSON and safetensors; kinds, shapes and boxes stand in the one manifest."""
    source = tmp_path / "source"
    write_random(tiny("tiny_cm3leon"), source)
    assert sorted(path.name for path in source.iterdir()) == ["manifest.json", "rank_00000.safetensors"]
    settings = json.loads((source / "manifest.json").read_text())["settings"]
    assert settings["kinds"] == {"param": "BF16", "master": "F32", "exp_avg": "F32", "exp_avg_sq": "F32"}
    assert settings["tensors"]["positions.weight"] == [64, 64]
    assert settings["boxes"]["rank_00000.safetensors"]["exp_avg"]["layers.3.mlp.down.weight"] == ["0:64,0:128"]
    assert "exp_avg/layers.3.mlp.down.weight[0:64,0:128]" in read_header(source / "rank_00000.safetensors")
