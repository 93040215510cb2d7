"""Held-out evaluation while training: the figures of the exported model, in every layout, and training that is bitwise
what it is without.
"""

import math
from pathlib import Path

import pytest
import torch

from megacm3.convert.to_hf import Export, to_hf
from megacm3.convert.twin import register
from megacm3.data.documents import Layout
from megacm3.data.store import Store
from tests.helpers.distributed import ROOT
from tests.helpers.runs import curve, differing, finished, lines, train_ranks, write_config
from tests.helpers.stores import make_store

DOCUMENTS = 13
"""Not a multiple of any micro-batch: the last one has rows without loss, and one rank only such rows."""
LAYOUTS = {
    "one": (1, []),
    "data": (2, []),
    "zero3": (2, [f"deepspeed={ROOT}/ds_configs/zero3.json"]),
    "sequence": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "all": (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.recompute=none"]),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held_out")
    sizes = {"text_size": 256, "codebook_size": 128, "image_tokens": 16}
    make_store(folder / "other", documents=20, seed=1, **sizes)
    return write_config(folder, checkpoint="{every: 0, keep: 0}")


@torch.no_grad()
def exported(out: Path, store: Path) -> dict[str, float]:
    """Mean loss by kind of the checkpoint's export, by transformers, one document at a time."""
    register()
    from transformers import AutoModelForCausalLM

    export = Export.of(out)
    assert export.vocabulary is not None
    model = AutoModelForCausalLM.from_pretrained(to_hf(export, out / "hf")).eval()
    layout, kind = Layout(export.vocabulary), torch.from_numpy(export.vocabulary.kind)
    losses, kinds = [], []
    for number in range(DOCUMENTS):
        tokens = torch.from_numpy(layout.assemble([Store.open(store).document(number)])[0])
        logits = model(input_ids=tokens[None, :-1]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits.double(), tokens[1:], reduction="none"))
        kinds.append(kind[tokens[1:]])
    nll, kind = torch.cat(losses), torch.cat(kinds)
    return {"loss": nll.mean().item(), "text": nll[kind == 0].mean().item(), "image": nll[kind == 1].mean().item()}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * (n not in ("data", "pipeline"))) for n in LAYOUTS]
)
def test_training_is_bitwise_the_same_and_the_figures_are_the_exports(
    name: str, config: Path, tmp_path: Path
) -> None:
    ranks, layout = LAYOUTS[name]
    store = config.parent / "other"
    keys = [f"evaluation.store={store}", "evaluation.every=3", f"evaluation.documents={DOCUMENTS}"]
    finished(train_ranks(config, tmp_path / "without", *layout, ranks=ranks))
    finished(train_ranks(config, tmp_path / "with", *layout, *keys, ranks=ranks))
    assert curve(tmp_path / "with") == curve(tmp_path / "without")
    assert not differing(*(tmp_path / run / "checkpoints" / "step_000008" for run in ("with", "without")))

    found = {line["step"]: line for line in lines(tmp_path / "with") if "held_out_loss" in line}
    assert list(found) == [3, 6, 8]
    assert found[8]["held_out_loss"] < found[3]["held_out_loss"]
    expected, last = exported(tmp_path / "with", store), found[8]
    assert last["held_out_loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for kind in ("text", "image"):
        assert last[f"held_out_loss_{kind}"] == pytest.approx(expected[kind], rel=1e-5)
        assert last[f"held_out_perplexity_{kind}"] == pytest.approx(math.exp(expected[kind]), rel=1e-4)
    # 16 codes draw 32 x 32 pixels
    assert last["held_out_bits_per_pixel"] == pytest.approx(expected["image"] / math.log(2) * 16 / 32**2, rel=1e-5)
    assert "held_out_loss" not in lines(tmp_path / "without")[-1]
