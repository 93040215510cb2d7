"""A run that stops and resumes in the same layout is bitwise the unbroken one, with everything random switched on; and
one whose checkpoint loads as another model does not go on.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from megacm3.errors import CheckpointError
from megacm3.files import read_manifest, write_manifest
from tests.helpers.distributed import ROOT
from tests.helpers.runs import curve, differing, finished, lines, the_error, train_ranks, write_config
from tests.helpers.stores import make_neighbours

STEPS, STOP = 20, 7
LAYOUTS = {
    "tp2": ("tiny_cm3leon", 1, "parallel.tensor=2"),
    "tp2-sequence": ("tiny_modern", 1, "parallel.tensor=2", "parallel.sequence=true"),
    "pp2": ("tiny_modern", 1, "parallel.pipeline=2"),
    "pp2-tied": ("tiny_cm3leon", 0, "parallel.pipeline=2"),
    "zero1": ("tiny_cm3leon", 1),
    "zero2": ("tiny_modern", 2),
    "zero3": ("tiny_cm3leon", 3),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dropout, recomputation, CM3 masks of several spans, documents turned round, none to three retrieved documents."""
    folder = tmp_path_factory.mktemp("resume")
    path = write_config(
        folder,
        model="{dropout: 0.1, layers: 2, vocab_size: 512, sequence_length: 160}",
        objective="{kind: cm3, spans: 2.0}",
        retrieval="{documents: [0.25, 0.25, 0.25, 0.25]}",
        optimizer="{lr: 3.0e-3, schedule: {warmup: 2}}",
        train=f"{{steps: {STEPS}, micro_batch: 2, global_batch: 4, dtype: fp32, device: cpu}}",
        checkpoint="{every: 0, keep: 0}",
    )
    store = folder / "store"
    mixture = f"[{{store: {store}, neighbours: {make_neighbours(folder, store)}}}]"
    data = f"data: {{mixture: {mixture}, packing: whole, rotation: 0.5, workers: 0}}\n"
    kept = [line for line in path.read_text().splitlines(keepends=True) if not line.startswith("data:")]
    path.write_text("".join(kept) + data)
    return path


@pytest.mark.parametrize(
    ("preset", "zero", "layout"),
    [
        pytest.param(*entry[:2], entry[2:], id=name, marks=() if name == "zero1" else pytest.mark.long)
        for name, entry in LAYOUTS.items()
    ],
)
def test_twenty_steps_with_a_stop_are_bitwise_those_without(
    preset: str, zero: int, layout: tuple[str, ...], config: Path, tmp_path: Path
) -> None:
    words = [f"model.preset={preset}", f"deepspeed={ROOT}/ds_configs/zero{zero}.json", *layout]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finished(train_ranks(config, whole, *words))
    finished(train_ranks(config, parts, *words, f"train.stop_at={STOP}"))
    assert [line["step"] for line in lines(parts)] == list(range(1, STOP + 1))
    resumed = train_ranks(config, parts, *words, "checkpoint.resume=required")
    finished(resumed)
    assert f"step {STOP}," in resumed[0].log
    assert len(curve(whole)) == STEPS and curve(parts) == curve(whole)
    # Parameters, fp32 masters and both of Adam's moments.
    last = f"checkpoints/step_{STEPS:06d}"
    assert differing(whole / last, parts / last) == []
    drawn = lines(whole)
    assert sum(line["data_retrieved"] for line in drawn) > STEPS and sum(line["data_spans"] for line in drawn) > STEPS


@pytest.mark.long
def test_the_random_parts_are_switched_on(config: Path, tmp_path: Path) -> None:
    """Without one of them, or with other draws, the second step is another (the first has no dropout: blocks add 0)."""
    keys = {
        "as configured": (),
        "no dropout": ("model.dropout=0",),
        "no masks": ("objective.kind=causal",),
        "nothing retrieved": ("retrieval.documents=[1,0,0,0]",),
        "another seed": ("train.seed=1",),
    }
    losses = {}
    for name, words in keys.items():
        finished(train_ranks(config, tmp_path / name, "model.preset=tiny_cm3leon", "train.stop_at=2", *words, ranks=1))
        losses[name] = lines(tmp_path / name)[1]["loss"]
    assert len(set(losses.values())) == len(keys), losses


def upside_down(step: Path, name: str) -> None:
    """Turn the rows of a parameter round in every file that has some of it, with hashes that fit: read without a word,
    but another model.
    """
    manifest = read_manifest(step, "checkpoint", verify="none", error=CheckpointError)
    for path in step.glob("rank_*.safetensors"):
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        for key, entry in header.items():
            if name in key and "exp_avg" not in key:
                first, last = (start + offset for offset in entry["data_offsets"])
                rows = np.frombuffer(data[first:last], np.uint8).reshape(entry["shape"][0], -1)
                data[first:last] = rows[::-1].tobytes()
        path.write_bytes(data)
    write_manifest(step, "checkpoint", manifest.settings, manifest.inputs)


@pytest.mark.parametrize(
    ("name", "zero", "layout"),
    [
        pytest.param("embed.weight", 3, (), id="zero3", marks=pytest.mark.long),
        pytest.param("attn.q.weight", 1, ("parallel.tensor=2",), id="tp2", marks=pytest.mark.long),
        pytest.param("head.weight", 1, ("parallel.pipeline=2",), id="pp2-last-stage"),
        pytest.param("embed.weight", 1, ("parallel.pipeline=2",), id="pp2-first-stage", marks=pytest.mark.long),
        pytest.param("attn_norm.weight", 1, (), id="gains-within-a-hundredth", marks=pytest.mark.long),
    ],
)
def test_a_checkpoint_that_loads_as_another_model_is_refused(
    name: str, zero: int, layout: tuple[str, ...], config: Path, tmp_path: Path
) -> None:
    words = ["model.preset=tiny_modern", f"deepspeed={ROOT}/ds_configs/zero{zero}.json", *layout]
    finished(train_ranks(config, tmp_path, *words, "train.stop_at=2"))
    step = tmp_path / "checkpoints/step_000002"
    upside_down(step, name)
    error = the_error(train_ranks(config, tmp_path, *words, "checkpoint.resume=required"), 4)
    assert error.startswith(f"{step} was loaded, but the logits of its fixed batch differ by ")


@pytest.mark.parametrize(("dtype", "allowed"), [("fp32", 2e-5), pytest.param("bf16", 0.05, marks=pytest.mark.long)])
def test_another_layouts_logits_differ_by_rounding(dtype: str, allowed: float, config: Path, tmp_path: Path) -> None:
    layouts = [("parallel.tensor=2", "parallel.sequence=true"), ("parallel.pipeline=2",), (), ()]
    differences = []
    for turn, layout in enumerate(layouts):
        words = [f"deepspeed={ROOT}/ds_configs/zero{3 if turn == 2 else 1}.json", *layout, f"train.stop_at={turn + 2}"]
        words += ["model.preset=tiny_modern", f"train.dtype={dtype}"]
        outcomes = train_ranks(config, tmp_path, *words, ranks=1 if turn == 3 else 2)
        finished(outcomes)
        differences += re.findall(r"logits of the fixed batch differ by (\S+)", outcomes[0].log)
    assert len(differences) == 3 and all(float(found) < allowed for found in differences), differences
    assert float(differences[0]) > 0  # of other sums; those of a pipeline and of ZeRO are the same
