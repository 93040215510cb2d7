"""Held-out documents of a run: which rows a rank gets, what is refused, and where the figures go."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch

from megacm3.config import Config
from megacm3.data.build import build_stream
from megacm3.errors import ConfigError, DataError
from megacm3.evaluation.charts import loss_chart
from megacm3.parallel.context import ParallelContext
from megacm3.parallel.engine import StepResult
from megacm3.resolve import load_config
from megacm3.training.held_out import HeldOut, open_held_out
from megacm3.training.metrics import Metrics
from tests.helpers.stores import make_store

SIZES = {"text_size": 256, "codebook_size": 128, "image_tokens": 16}
CONTEXT = ParallelContext(0, 2, 1, 2, 1, False, None, None, None, None, None, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stores")
    make_store(root / "trained", documents=12, **SIZES)
    make_store(root / "other", documents=9, seed=1, **SIZES)
    return root


def config(folder: Path, *overrides: str, store: str = "other") -> Config:
    keys = ["model.preset=tiny_cm3leon", "model.vocab_size=512", "data.packing=whole", "train.micro_batch=2"]
    keys += [f"data.mixture=[{{store: {folder / 'trained'}}}]", "train.global_batch=4", "train.steps=6"]
    keys += ["log.every=4", "log.tensorboard=false", f"evaluation.store={folder / store}", "evaluation.every=3"]
    return load_config(None, [*keys, *overrides])


def held_out(given: Config, context: ParallelContext = CONTEXT) -> HeldOut:
    found = open_held_out(given, context, build_stream(given))
    assert found is not None
    return found


def test_every_document_is_in_one_row_of_one_rank_and_all_ranks_have_as_many_batches(folder: Path) -> None:
    given = config(folder)
    ranks = [held_out(given, dataclasses.replace(CONTEXT, rank=rank))._batches for rank in (0, 1)]
    assert [len(batches) for batches in ranks] == [3, 3]
    rows = [
        row for batches in ranks for batch in batches for row in zip(batch["tokens"], batch["targets"], strict=True)
    ]
    real = [(tokens, targets) for tokens, targets in rows if (targets >= 0).any()]
    assert len(rows) == 12 and len(real) == 9
    assert len({tuple(tokens.tolist()) for tokens, _ in real}) == 9
    for tokens, targets in real:
        count = int((targets >= 0).sum())
        assert torch.equal(tokens[1:count], targets[: count - 1])
        assert int((tokens[:count] >= 256).sum()) >= 16  # the codes of its picture are there


def test_rows_of_a_pipeline_and_of_sequence_parallel_have_fitting_lengths(folder: Path) -> None:
    lengths = [batch["tokens"].shape[1] for batch in held_out(config(folder))._batches]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]
    piped = held_out(config(folder), dataclasses.replace(CONTEXT, pipeline=2))
    assert {batch["tokens"].shape[1] for batch in piped._batches} == {lengths[0]}
    cut = held_out(config(folder, "parallel.tensor=4", "parallel.sequence=true"))
    assert all(batch["tokens"].shape[1] % 4 == 0 for batch in cut._batches)


def test_a_long_document_is_cut_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = config(folder, "model.sequence_length=20", "data.packing=blocks")
    with caplog.at_level(logging.WARNING):
        batches = held_out(given)._batches
    assert max(batch["tokens"].shape[1] for batch in batches) == 20
    assert "held-out documents are cut at model.sequence_length = 20" in caplog.text


def test_what_does_not_belong_is_refused(folder: Path, tmp_path: Path) -> None:
    make_store(tmp_path / "codes", documents=4, seed=2, **(SIZES | {"codebook_size": 64}))
    make_store(tmp_path / "made", documents=4, seed=2, inputs={"text_tokenizer": "b" * 64}, **SIZES)
    make_store(tmp_path / "trained", documents=4, inputs={"text_tokenizer": "a" * 64}, **SIZES)
    with pytest.raises(ConfigError, match="codes has codebook_size 64; expected 128"):
        held_out(config(folder, store=str(tmp_path / "codes")))
    with pytest.raises(ConfigError, match="is trained on"):
        held_out(config(folder, store="trained"))
    with pytest.raises(DataError, match=r"evaluation\.store = .*nowhere does not exist"):
        held_out(config(folder, store="nowhere"))
    with pytest.raises(ConfigError, match="made with text_tokenizer bbbbbbbbbbbb; expected aaaaaaaaaaaa"):
        held_out(config(tmp_path, store="made"))
    for key in ("every", "documents"):
        with pytest.raises(ConfigError, match=rf"evaluation\.{key} = 0; expected at least 1"):
            config(folder, f"evaluation.{key}=0")
    assert open_held_out(config(folder, "evaluation.store=''"), CONTEXT, build_stream(config(folder))) is None


def test_figures_get_a_line_at_their_step_and_no_time_of_the_training(folder: Path, tmp_path: Path) -> None:
    sums = torch.tensor([100.0, 8.0, 4.0, 50.0, 60.0, 20.0, 36.0, 18.0], dtype=torch.float64)
    due = held_out(config(folder, "train.steps=7"))
    assert [step for step in range(1, 8) if due.due(step)] == [3, 6, 7]
    with Metrics(config(folder), tmp_path, 0, active=True) as metrics:
        for step in range(1, 5):
            if step == 3:
                metrics.evaluated({"held_out_loss": 1.5, "held_out_loss_text": 2.5, "held_out_seconds": 0.0})
            metrics.add(step, StepResult(sums, 1.0, 1.0), 0.1, "ab", {}, 10)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3, 4]
    assert ["held_out_loss" in line for line in lines] == [False, True, False]
    assert "text tokens, held out: 2.500" in loss_chart(lines)
    assert "held out" not in loss_chart(lines[:1])
    with Metrics(config(folder), tmp_path / "slow", 0, active=False) as metrics:
        before = metrics._started
        metrics.evaluated({"held_out_loss": 1.5, "held_out_seconds": 40.0})
        assert metrics._started == before + 40
