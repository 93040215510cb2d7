"""Loss by modality against transformers' own loss; counting; stores of other tokenizers."""

import math

import numpy as np
import pytest
import torch

from megacm3.data.documents import IMAGE, TEXT, Document, Layout, Segment
from megacm3.data.store import Store
from megacm3.errors import DataError
from megacm3.evaluation import perplexity as module
from megacm3.evaluation.perplexity import check_store, perplexity, token_losses
from megacm3.files import read_manifest
from tests.helpers.stores import make_store


def documents(count, rng=None):
    rng = rng or np.random.default_rng(0)
    made = []
    for i in range(count):
        caption = Segment(TEXT, rng.integers(1, 320, rng.integers(1, 20)))
        made.append(Document(i, (caption, Segment(IMAGE, rng.integers(0, 32, 16)))))
    return made


def test_loss_equals_transformers(hf_folder, generator, monkeypatch):
    """Also when documents share passes and logits come in blocks."""
    from transformers import OPTForCausalLM

    model = OPTForCausalLM.from_pretrained(hf_folder)
    vocabulary = generator.vocabulary
    losses: dict = {0: [], 1: []}
    eighths: dict = {0: [[] for _ in range(8)], 1: [[] for _ in range(8)]}
    for document in documents(9):
        tokens = torch.from_numpy(Layout(vocabulary).assemble([document])[0])
        with torch.no_grad():
            logits = model(input_ids=tokens[None, :-1]).logits[0, :, : vocabulary.size]
        each = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        for at, (loss, kind) in enumerate(zip(each.tolist(), vocabulary.kind[tokens[1:].numpy()], strict=True), 1):
            if kind in losses:
                losses[kind].append(loss)
                eighths[kind][at * 8 // (generator.context + 1)].append(loss)
    monkeypatch.setattr(module, "BATCH_TOKENS", 100)
    monkeypatch.setattr(module, "LOGIT_ROWS", 7)
    found = perplexity(generator, documents(9))
    assert found["documents"] == 9 and found["documents_cut"] == 0
    for kind, name in ((0, "text"), (1, "image")):
        assert found[name]["tokens"] == len(losses[kind])
        assert found[name]["loss"] == pytest.approx(np.mean(losses[kind]), abs=1e-4)
        assert found[name]["perplexity"] == pytest.approx(math.exp(np.mean(losses[kind])), rel=1e-3)
        wanted = [np.mean(part) if part else None for part in eighths[kind]]
        assert found[name]["by_position"] == pytest.approx(wanted, abs=1e-4)
        assert sum(value is not None for value in wanted) > 1
    bits = np.mean(losses[1]) / math.log(2) * 16 / 32**2
    assert found["image"]["bits_per_pixel"] == pytest.approx(bits, abs=1e-5)


def test_answers_of_fine_tuning_stand_behind_their_turn(generator, monkeypatch):
    """A model tuned on answers has read `<end-of-turn>` before each of them."""
    caption, picture = documents(1)[0].segments
    tuned = [Document(0, (picture, Segment(TEXT, caption.tokens, answer=True)))]
    losses, targets = token_losses(generator, [Layout(generator.vocabulary, turns=True).assemble(tuned)[0]])
    wanted = float(losses[torch.from_numpy(generator.vocabulary.is_text(targets.numpy()))].mean())
    assert perplexity(generator, tuned)["text"]["loss"] != pytest.approx(wanted, abs=1e-3)
    monkeypatch.setattr(generator, "answers", True)
    assert perplexity(generator, tuned)["text"]["loss"] == pytest.approx(wanted, abs=1e-5)


def test_documents_longer_than_the_context_are_cut_and_counted(generator):
    long = Document(0, (Segment(TEXT, np.arange(1, 200)),))
    found = perplexity(generator, [long, *documents(1)])
    assert found["documents_cut"] == 1 and found["text"]["tokens"] >= 95


def test_only_text_has_no_picture_figures(generator):
    found = perplexity(generator, [Document(0, (Segment(TEXT, np.arange(1, 20)),))])
    assert "image" not in found and found["text"]["tokens"] == 19


def test_stores_of_other_tokenizers_are_refused(generator, tmp_path):
    sizes = {"documents": 4, "text_size": 320, "codebook_size": 32, "image_tokens": 16}
    own = {
        name: read_manifest(generator.folder / name, name).fingerprint for name in ("text_tokenizer", "image_tokenizer")
    }
    store = Store.open(make_store(tmp_path / "own", **sizes, inputs=own))
    check_store(generator, store)
    found = perplexity(generator, (store.document(i) for i in range(4)))
    assert found["documents"] == 4 and found["image"]["tokens"] == 64
    other = Store.open(make_store(tmp_path / "other", **sizes, inputs=own | {"image_tokenizer": "f" * 64}))
    with pytest.raises(DataError, match="image_tokenizer ffffffffffff"):
        check_store(generator, other)
    small = Store.open(make_store(tmp_path / "small", **sizes | {"codebook_size": 16}, inputs=own))
    with pytest.raises(DataError, match="codebook_size 16"):
        check_store(generator, small)
