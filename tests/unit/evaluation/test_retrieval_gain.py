"""Loss with documents in front: of the right tokens, behind the right documents, and said as it is."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megacm3.data.documents import IMAGE, TEXT, Layout
from megacm3.data.parts import write_store
from megacm3.data.store import Store, StoreShape
from megacm3.errors import ConfigError, DataError
from megacm3.evaluation import retrieval_gain
from megacm3.evaluation.page import render
from megacm3.evaluation.retrieval_gain import MOST, WAYS, HeldOut, gain
from megacm3.retrieval.bank import MemoryBank
from megacm3.retrieval.build_bank import build_bank
from megacm3.retrieval.find_neighbours import find_neighbours
from megacm3.retrieval.neighbours import NeighbourTable
from megacm3.retrieval.options import BankOptions, NeighbourOptions
from tests.helpers.tiny_models import CODEBOOK, GRID, PIXELS

TRAINING, HELD = 40, 10


def write(folder: Path, prefix: str, count: int, seed: int) -> Store:
    """A store of pairs whose caption is of two to six tokens; the last one's is too long for three before it."""
    rng = np.random.default_rng(seed)
    rows = []
    for n in range(count):
        length = 60 if prefix == "h" and n == count - 1 else int(rng.integers(2, 5))
        pair = [(TEXT, rng.integers(1, 320, length)), (IMAGE, rng.integers(0, CODEBOOK, GRID * GRID))]
        rows.append((pair, {"key": f"{prefix}{n}", "caption": f"{prefix} caption {n}", "images": 1}))
    write_store(folder, iter(rows), StoreShape(320, CODEBOOK, GRID * GRID, PIXELS), {})
    return Store.open(folder)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> HeldOut:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path_factory.mktemp("gain")
    stores = {"t": write(root / "t", "t", TRAINING, 0), "h": write(root / "h", "h", HELD, 1)}
    rng = np.random.default_rng(2)
    keys = [f"{prefix}{n}" for prefix, store in stores.items() for n in range(len(store))]
    for name in ("img_emb", "text_emb", "metadata"):
        (root / "vectors" / name).mkdir(parents=True)
    for name in ("img_emb", "text_emb"):
        vectors = rng.normal(size=(len(keys), 16)).astype(np.float32)
        # Training document 7 is a copy of held-out document 3.
        vectors[7] = vectors[TRAINING + 3]
        np.save(root / "vectors" / name / "0.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    pq.write_table(pa.table({"key": keys}), root / "vectors" / "metadata" / "0.parquet")
    for prefix in stores:
        build_bank(
            BankOptions(str(root / prefix), f"precomputed:{root / 'vectors'}", str(root / f"b{prefix}"), workers=1)
        )
    given = {"keep": 8, "search": 16, "text_variants": 1, "query_dropout": 0.0, "workers": 1}
    find_neighbours(NeighbourOptions(str(root / "bt"), str(root / "n"), queries=str(root / "bh"), **given))
    return HeldOut(stores["h"], stores["t"], NeighbourTable.open(root / "n"))


def test_losses_are_those_of_the_held_out_picture_behind_its_documents(generator, hf_folder, held_out):
    from transformers import OPTForCausalLM

    result = gain([generator], held_out)
    assert result["documents"] + result["left_out"] == HELD and result["left_out"] >= 1
    assert result["image_tokens"] == result["documents"] * GRID * GRID
    model, layout = OPTForCausalLM.from_pretrained(hf_folder), Layout(generator.vocabulary)
    rows = {(row["way"], row["documents"]): row for row in result["rows"]}
    assert list(rows) == [("none", 0), *((way, n) for n in range(1, MOST + 1) for way in WAYS)]
    kept = [doc for doc in range(HELD) if len(held_out.in_front(doc)) == 1 + MOST * len(WAYS)][: result["documents"]]
    for condition in (("none", 0), (WAYS[1], 2), (WAYS[2], 3)):
        losses = []
        for doc in kept:
            front = held_out.in_front(doc)[condition]
            documents = [*(held_out.candidates.document(n) for n in front), held_out.store.document(doc)]
            tokens = torch.from_numpy(layout.assemble(documents)[0])
            with torch.no_grad():
                logits = model(input_ids=tokens[None, :-1]).logits[0, :, : generator.vocabulary.size]
            each = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
            # `... B I </s>`: the picture's codes are the last targets but one.
            losses.append(float(each[-1 - GRID * GRID : -1].mean()))
        assert rows[condition]["loss"] == pytest.approx(np.mean(losses), abs=1e-4)


def test_copies_never_stand_in_front(held_out):
    by_number = {doc: held_out.in_front(doc) for doc in range(HELD)}
    assert all(7 not in front for front in by_number[3].values())
    assert any(7 in front for doc in by_number if doc != 3 for front in by_number[doc].values())
    for fronts in by_number.values():
        assert all(len(set(front)) == count for (_, count), front in fronts.items())
    assert held_out.in_front(5) == by_number[5]


def test_one_model_against_itself_shows_no_difference(generator, held_out):
    result = gain([generator, generator], held_out, baseline=[generator, generator])
    assert result["baseline"]["gain"] == {"mean": 0.0, "error": 0.0}
    assert result["rows"][0]["spread"] == 0.0
    assert retrieval_gain.words(result)[-1].startswith("a model trained without retrieval")
    assert "no difference" in retrieval_gain.words(result)[-1]


@pytest.mark.parametrize(("shift", "said"), [(0.5, "better"), (-0.5, "worse"), (0.0, "no difference")])
def test_a_gain_a_loss_and_nothing_are_told_apart(shift, said):
    rng = np.random.default_rng(0)
    losses = rng.normal(4, 0.3, (3, 50))
    other = losses + shift + rng.normal(0, 0.2, (3, 50))
    difference = retrieval_gain._difference(other, losses)
    assert retrieval_gain.verdict(difference) == said
    assert difference["mean"] == pytest.approx(shift, abs=0.1)
    # One seed of three that differs is noise of seeds, however many documents say so.
    moved = losses + np.array([[3.0], [0.0], [0.0]])
    assert retrieval_gain.verdict(retrieval_gain._difference(moved, losses)) == "no difference"


def test_the_table_is_on_the_page(generator, held_out):
    result = gain([generator], held_out)
    result["latency_ms"] = {"both": {"p50": 1.25, "p99": 9.5}}
    page = render("Report", "", [], [retrieval_gain.section(result)])
    assert "Does retrieval help?" in page and "one seed" in page and "p99 9.5 ms" in page
    assert all(f"{row['loss']:.4f}" in page for row in result["rows"])


def test_latency_is_measured_with_the_banks_own_encoder(held_out):
    bank = MemoryBank.open(held_out.table.folder.parent / "bt")
    with pytest.raises(ConfigError, match="precomputed vectors"):
        retrieval_gain.latency(bank, ["a caption"])


def test_what_does_not_belong_together_is_refused(generator, held_out, tmp_path):
    swapped = HeldOut(held_out.candidates, held_out.store, held_out.table)
    with pytest.raises(DataError, match="tools/find_neighbours"):
        gain([generator], swapped)
    with pytest.raises(ConfigError, match="no document of"):
        gain([generator], held_out, limit=0)
