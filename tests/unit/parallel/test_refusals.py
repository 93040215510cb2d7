"""What cannot be trained is refused before launch: the value, the rule, the nearest legal value."""

import json
from pathlib import Path
from typing import Any

import pytest

from megacm3.config import Config
from megacm3.errors import ConfigError
from megacm3.parallel.context import accumulation, check_world
from megacm3.parallel.deepspeed_json import LEGAL, fill_deepspeed_json, own_clipping, read_deepspeed_json
from megacm3.resolve import load_config

ROOT = Path(__file__).resolve().parents[3]
DS_CONFIGS = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))


def config(*overrides: str, ds: str | Path = "zero1") -> Config:
    path = ds if isinstance(ds, Path) else ROOT / "ds_configs" / f"{ds}.json"
    return load_config(None, ["model.preset=tiny_chameleon_34b", f"deepspeed={path}", *overrides])


def written(folder: Path, **keys: Any) -> Path:
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}} | keys))
    return path


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["parallel.tensor=3", "model.kv_heads=8"], ["model.heads = 8", "parallel.tensor = 3", "6 or 9"]),
        (["parallel.tensor=8"], ["parallel.tensor = 8", "model.kv_heads = 4", "at most parallel.tensor = 4"]),
        (["model.kv_heads=3"], ["model.heads = 8", "model.kv_heads = 3", "6 or 9"]),
        (["parallel.pipeline=3"], ["model.layers = 4", "parallel.pipeline = 3", "3 or 6"]),
        (
            ["parallel.tensor=4", "model.vocab_size=510"],
            ["model.vocab_size = 510", "parallel.tensor = 4", "508 or 512"],
        ),
        (
            ["parallel.tensor=4", "model.vocab_rows=514"],
            ["model.vocab_rows = 514", "parallel.tensor = 4", "512 or 516"],
        ),
        (["model.vocab_rows=500"], ["model.vocab_rows = 500", "model.vocab_size = 512"]),
        (["parallel.tensor=4", "model.vocab_rows=700"], ["model.vocab_rows = 700", "without any", "nearest: 512"]),
        (["parallel.tensor=2", "model.ffn_size=129"], ["model.ffn_size = 129", "parallel.tensor = 2", "128 or 130"]),
        (
            ["parallel.tensor=4", "parallel.sequence=true", "model.sequence_length=62"],
            ["model.sequence_length = 62", "parallel.tensor = 4", "60 or 64"],
        ),
        (["parallel.sequence=true"], ["parallel.sequence = true", "parallel.tensor = 1"]),
        (["model.hidden_size=68"], ["model.hidden_size = 68", "model.heads = 8", "64 or 72"]),
        (["model.qk_norm_groups=3"], ["model.heads = 8", "model.qk_norm_groups = 3", "6 or 9"]),
        (
            ["model.heads=12", "model.hidden_size=96", "model.kv_heads=6"],
            ["model.kv_heads = 6", "model.qk_norm_groups = 4", "4 or 8"],
        ),
        (["parallel.tensor=0"], ["parallel.tensor = 0", "at least 1"]),
        (["model.dropout=1"], ["model.dropout = 1", "less than 1"]),
        (["parallel.recompute=some"], ["parallel.recompute = 'some'", "none, selective, full"]),
        (["model.norm_order=post"], ["model.norm_order = 'post'", "pre, swin"]),
        (["data.position_reset=true"], ["data.position_reset", "data.document_mask = true"]),
        (["train.dtype=fp16"], ["train.dtype = 'fp16'", "fp32, bf16"]),
        (["parallel.tensr=2"], ["parallel.tensr", "parallel.tensor"]),
        (["model.heads=many"], ["model.heads", "many"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) and "=" in value[0] else "",
)
def test_shapes_and_degrees(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)


def test_world_size() -> None:
    cut = config("parallel.tensor=2", "parallel.pipeline=2")
    assert check_world(cut, 8) == 2
    for world, nearest in ((6, 4), (2, 4), (9, 8)):
        with pytest.raises(ConfigError, match=f"{world} processes .*multiple of 4, for example {nearest}"):
            check_world(cut, world)


@pytest.mark.parametrize(
    "total, micro, data, found", [(8, 2, 2, 2), (8, 2, 4, 1), (2048, 1, 512, 4), (8, 8, 1, 1), (6, 1, 3, 2)]
)
def test_accumulation_is_derived(total: int, micro: int, data: int, found: int) -> None:
    assert accumulation(config(f"train.global_batch={total}", f"train.micro_batch={micro}"), data) == found


@pytest.mark.parametrize(
    "total, micro, data, arithmetic, nearest",
    [
        (10, 2, 2, "10 / 4 = 2.50", "8 or 12"),
        (2, 2, 4, "2 / 8 = 0.25", "8"),
        (2048, 3, 8, "2048 / 24 = 85.33", "2040 or 2064"),
    ],
)
def test_impossible_batches_show_the_arithmetic(
    total: int, micro: int, data: int, arithmetic: str, nearest: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        accumulation(config(f"train.global_batch={total}", f"train.micro_batch={micro}"), data)
    message = str(caught.value)
    assert arithmetic in message and message.endswith(f"nearest legal train.global_batch: {nearest}")


@pytest.mark.parametrize("ds", DS_CONFIGS)
@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_legal_table(ds: str, pipeline: int, dtype: str) -> None:
    """Every file of ds_configs/, as the table in its README and in the error says."""
    legal = pipeline == 1 or ds == "zero1" or (ds == "zero0" and dtype == "fp32")
    asked = config(f"parallel.pipeline={pipeline}", f"train.dtype={dtype}", ds=ds)
    if legal:
        fill_deepspeed_json(asked, 2)
        return
    with pytest.raises(ConfigError) as caught:
        fill_deepspeed_json(asked, 2)
    message = str(caught.value)
    assert f"parallel.pipeline = {pipeline}" in message and LEGAL in message and "zero1.json" in message


def test_the_readme_has_the_same_table() -> None:
    assert LEGAL in (ROOT / "ds_configs" / "README.md").read_text()
    for name in DS_CONFIGS:
        assert f"`{name}.json`" in (ROOT / "ds_configs" / "README.md").read_text()


@pytest.mark.parametrize("ds", DS_CONFIGS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_auto_is_left(ds: str, dtype: str) -> None:
    asked = config("train.micro_batch=2", "train.global_batch=24", f"train.dtype={dtype}", "optimizer.clip=0.7", ds=ds)
    tree = fill_deepspeed_json(asked, 3)
    assert '"auto"' not in json.dumps(tree)
    assert (tree["train_batch_size"], tree["train_micro_batch_size_per_gpu"]) == (24, 2)
    assert tree["gradient_accumulation_steps"] == 4
    assert tree["bf16"]["enabled"] == (dtype == "bf16")
    assert tree["gradient_clipping"] == (0.0 if own_clipping(tree) else 0.7)
    assert tree["pipeline"] == {"pipe_partitioned": False, "grad_partitioned": False}
    stage = tree["zero_optimization"]["stage"]
    # bf16 gradients are summed in fp32 wherever DeepSpeed can.
    assert tree["data_types"]["grad_accum_dtype"] == ("bf16" if stage == 0 and dtype == "bf16" else "fp32")
    assert tree["communication_data_type"] == "fp32"


@pytest.mark.parametrize(
    "keys, parts",
    [
        ({"train_batch_size": 9}, ["train_batch_size = 9", "train.global_batch (= 8)"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["train_micro_batch_size_per_gpu = 4", "train.micro_batch (= 1)"]),
        ({"gradient_accumulation_steps": 3}, ["gradient_accumulation_steps = 3", "(= 8)"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping = 0.5", "optimizer.clip (= 1.0)"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled = True", "train.dtype (= False)"]),
        ({"fp16": {"enabled": True}}, ["'fp16'", "remove it"]),
        ({"optimizer": {"type": "Adam"}}, ["'optimizer'", "remove it"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["'scheduler'", "remove it"]),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, ["'activation_checkpointing'", "remove it"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["grad_accum_dtype = bf16", "train.dtype = fp32"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage = 4", "0, 1, 2 or 3"]),
        ({"zero_optimization": 1}, ["'zero_optimization' is 1", "object"]),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            ["offload_param", "ZeRO stage 2", LEGAL],
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            ["offload_optimizer", "ZeRO stage 0"],
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            ["offload_param.device = 'nvme'", "'cpu'"],
        ),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, ["round_robin_gradients", "false"]),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_json_that_contradicts_the_config(tmp_path: Path, keys: dict[str, Any], parts: list[str]) -> None:
    asked = config(ds=written(tmp_path, **keys))
    with pytest.raises(ConfigError) as caught:
        fill_deepspeed_json(asked, 1)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_offloading_under_a_pipeline(tmp_path: Path) -> None:
    ds = written(tmp_path, zero_optimization={"stage": 1, "offload_optimizer": {"device": "cpu"}})
    with pytest.raises(ConfigError, match=r"offload_optimizer with ZeRO stage 1 and parallel\.pipeline = 2"):
        fill_deepspeed_json(config("parallel.pipeline=2", ds=ds), 1)


@pytest.mark.parametrize("flag", ["pipe_partitioned", "grad_partitioned"])
def test_partitioned_hand_over_is_refused_under_a_pipeline(tmp_path: Path, flag: str) -> None:
    ds = written(tmp_path, pipeline={flag: True})
    with pytest.raises(ConfigError, match=f"pipeline.{flag} = true"):
        fill_deepspeed_json(config("parallel.pipeline=2", ds=ds), 1)
    assert fill_deepspeed_json(config(ds=ds), 1)["pipeline"][flag] is False


def test_what_agrees_is_taken(tmp_path: Path) -> None:
    ds = written(tmp_path, train_batch_size=8, gradient_clipping=1.0, fp16={"enabled": False}, bf16={"enabled": False})
    assert fill_deepspeed_json(config(ds=ds), 2)["train_batch_size"] == 8


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    listed = tmp_path / "list.json"
    listed.write_text("[]")
    for path, part in ((tmp_path / "none.json", "does not exist"), (broken, "is not JSON"), (listed, "no JSON object")):
        with pytest.raises(ConfigError, match=part):
            read_deepspeed_json(config(ds=path))


@pytest.mark.parametrize(
    "ranks, overrides, parts",
    [
        (3, ["parallel.tensor=3"], ["parallel.tensor = 3", "model.heads = 8 is not divisible", "6 or 9"]),
        (8, ["parallel.tensor=8"], ["parallel.tensor = 8 is more than model.kv_heads = 4", "at most"]),
        (3, ["parallel.pipeline=3"], ["model.layers = 4 is not divisible", "parallel.pipeline = 3", "3 or 6"]),
        (4, ["parallel.tensor=4", "model.vocab_size=510"], ["model.vocab_size = 510 is not divisible", "508 or 512"]),
        (
            4,
            ["parallel.tensor=4", "parallel.sequence=true", "model.sequence_length=62"],
            ["model.sequence_length = 62 is not divisible", "60 or 64"],
        ),
        (2, ["parallel.pipeline=2", "deepspeed={ds}/zero2.json"], ["ZeRO stage 2", "zero1.json", LEGAL]),
        (2, ["parallel.pipeline=2", "deepspeed={ds}/zero3.json"], ["ZeRO stage 3", "zero1.json", LEGAL]),
        (2, ["parallel.pipeline=2", "train.dtype=bf16", "deepspeed={ds}/zero0.json"], ["ZeRO stage 0", LEGAL]),
        (1, ["deepspeed={tmp}/ds.json"], ["gradient_clipping = 0.5 contradicts optimizer.clip (= 1.0)", '"auto"']),
        (6, ["parallel.tensor=4"], ["6 processes cannot be cut", "a multiple of 4"]),
        (3, [], ["train.global_batch = 8", "3 data-parallel ranks", "6 or 9"]),
        (1, ["log.replicas_every=0"], ["log.replicas_every = 0", "at least 1"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) and value and "=" in value[0] else "",
)
def test_a_launch_is_refused_before_any_process_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, overrides: list[str], parts: list[str]
) -> None:
    """What a launcher's script asks first: `megacm3.train --dry-run RANKS`. Neither processes nor groups nor files."""
    import os
    import subprocess

    import torch.distributed as dist

    from megacm3.train import main

    tree = json.loads((ROOT / "ds_configs" / "zero1.json").read_text()) | {"gradient_clipping": 0.5}
    (tmp_path / "ds.json").write_text(json.dumps(tree))
    (tmp_path / "config.yaml").write_text("model: {preset: tiny_chameleon_34b}\n")
    out = tmp_path / "out"
    asked = [text.format(ds=ROOT / "ds_configs", tmp=tmp_path) for text in overrides]

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(os, "fork", started)
    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(dist, "init_process_group", started)
    with pytest.raises(ConfigError) as caught:
        main(["--dry-run", str(ranks), str(tmp_path / "config.yaml"), f"train.out={out}", *asked])
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert not out.exists() and not dist.is_initialized()
