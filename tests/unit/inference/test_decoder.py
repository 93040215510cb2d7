"""The decoder's logits are transformers' own, however the tokens are fed."""

import json
import shutil

import pytest
import torch

from megacm3.errors import CheckpointError, ConfigError
from megacm3.inference.decoder import Decoder
from megacm3.inference.prefill import _shared, prefill

FAMILIES = ["opt", "llama", "qwen3", "chameleon", "chameleon-swin"]


def reference_logits(model, tokens):
    """transformers' logits; for Chameleon from the hidden states, since its forward removes image logits."""
    with torch.no_grad():
        if model.config.model_type == "chameleon":
            return model.lm_head(model.model(input_ids=tokens, use_cache=False).last_hidden_state)
        return model(input_ids=tokens, use_cache=False).logits


def some_tokens(rows, length, seed=0):
    return torch.randint(0, 380, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_in_one_pass_and_token_by_token(models, family):
    model, folder = models[family]
    decoder = Decoder.load(folder)
    tokens = some_tokens(3, 20)
    expected = reference_logits(model, tokens)
    cache = decoder.cache(3, 24)
    found = decoder.logits(decoder.forward(tokens, [0, 0, 0], cache))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert expected.std() > 0.5  # the comparison means something

    cache = decoder.cache(3, 24)
    decoder.forward(tokens[:, :7], [0, 0, 0], cache)
    decoder.forward(tokens[:, 7:12], [7, 7, 7], cache)  # a later chunk of several tokens
    for t in range(12, 20):
        step = decoder.logits(decoder.forward(tokens[:, t : t + 1], [t] * 3, cache)[:, 0])
        torch.testing.assert_close(step, expected[:, t], atol=2e-4, rtol=1e-4)
    # One row alone takes matrix-vector products.
    alone = decoder.cache(1, tokens.shape[1])
    for t in range(tokens.shape[1]):
        step = decoder.logits(decoder.forward(tokens[1:2, t : t + 1], [t], alone)[:, 0])
        torch.testing.assert_close(step, expected[1:2, t], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["opt", "qwen3"])
def test_rows_of_different_lengths_in_one_pass(models, family):
    model, folder = models[family]
    decoder = Decoder.load(folder)
    tokens = some_tokens(3, 30)
    lengths = [3, 17, 9]
    cache = decoder.cache(4, 30)
    hidden = prefill(decoder, [tokens[r, :n].tolist() for r, n in enumerate(lengths)], cache, first_row=1)
    for r, n in enumerate(lengths):
        expected = reference_logits(model, tokens[r : r + 1, :n])[0, -1]
        torch.testing.assert_close(decoder.logits(hidden[r]), expected, atol=2e-4, rtol=1e-4)
    for step in range(5):
        at = [n + step for n in lengths]
        drawn = torch.stack([tokens[r, p] for r, p in enumerate(at)])[:, None]
        hidden = decoder.forward(drawn, at, cache, first_row=1)[:, 0]
    for r, n in enumerate(lengths):
        expected = reference_logits(model, tokens[r : r + 1, : n + 5])[0, -1]
        torch.testing.assert_close(decoder.logits(hidden[r]), expected, atol=2e-4, rtol=1e-4)


def test_equal_beginnings_run_once_and_give_the_same(models, monkeypatch):
    model, folder = models["opt"]
    decoder = Decoder.load(folder)
    shared = some_tokens(1, 40)[0].tolist()
    prompts = [[*shared, 5, 6], [*shared, 7], [1, 2, 3], [*shared, 5, 6], shared[:18]]
    run = []
    forward = Decoder.forward

    def counting(self, tokens, *args):
        run.append(tokens.numel())
        return forward(self, tokens, *args)

    monkeypatch.setattr(Decoder, "forward", counting)
    hidden = prefill(decoder, prompts, decoder.cache(5, 60))
    for row, prompt in enumerate(prompts):
        expected = reference_logits(model, torch.tensor([prompt]))[0, -1]
        torch.testing.assert_close(decoder.logits(hidden[row]), expected, atol=2e-4, rtol=1e-4)
    assert sum(run) < 42 + 18  # neither the copies nor the shared beginning ran again


def test_shared_beginnings_leave_a_token_of_every_prompt():
    prompts = sorted([tuple(range(20)), tuple(range(60)), (*range(50), 99), (99,)])
    assert _shared(prompts, 0, 4, 0) == [(0, 3, 0, 19), (1, 3, 19, 50)]
    assert _shared([(1, 2), (1, 3)], 0, 2, 0) == []  # too short to be worth it


def test_a_padded_write_does_not_touch_what_is_read(models):
    """Rows shorter than the pass write their padding beside the cache's slots, even when the cache is full."""
    model, folder = models["opt"]
    decoder = Decoder.load(folder)
    tokens = some_tokens(2, 10)
    cache = decoder.cache(2, 10)
    decoder.forward(tokens[:, :8], [0, 0], cache, 0, [8, 2])
    hidden = decoder.forward(torch.stack((tokens[0, 8:10], tokens[1, 2:4])), [8, 2], cache, 0, [2, 2])
    for row, end in ((0, 10), (1, 4)):
        expected = reference_logits(model, tokens[row : row + 1, :end])[0, -1]
        torch.testing.assert_close(decoder.logits(hidden[row, 1]), expected, atol=2e-4, rtol=1e-4)


def test_head_of_a_part_of_the_vocabulary(models):
    _, folder = models["opt"]
    decoder = Decoder.load(folder)
    hidden = torch.randn(2, 32)
    for ids in (torch.arange(40, 72), torch.tensor([9, 4, 7])):
        part = decoder.logits(hidden, decoder.head_of(ids))
        torch.testing.assert_close(part, decoder.logits(hidden)[:, ids])
    assert decoder.head_of(torch.arange(40, 72)).data_ptr() == decoder.weights.head[40:].data_ptr()  # no copy


def test_a_config_that_does_not_say_so_is_tied_as_the_class_is(models, tmp_path):
    """OPT's default in transformers is tied; a Llama's is not."""
    for name, tied in (("opt", True), ("llama", False)):
        folder = tmp_path / name
        shutil.copytree(models[name][1], folder)
        config = json.loads((folder / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        (folder / "config.json").write_text(json.dumps(config))
        weights = Decoder.load(folder).weights
        assert (weights.head is weights.embed) == tied


def test_refusals(models, tmp_path):
    _, folder = models["opt"]
    with pytest.raises(CheckpointError, match="does not exist"):
        Decoder.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Decoder.load(tmp_path / "empty")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="cuda"):
            Decoder.load(folder, "cuda")

    def changed(name, source=folder, **keys):
        target = tmp_path / name
        shutil.copytree(source, target)
        config = json.loads((target / "config.json").read_text()) | keys
        (target / "config.json").write_text(json.dumps(config))
        return target

    with pytest.raises(CheckpointError, match="enable_bias"):
        Decoder.load(changed("bias", enable_bias=True))
    rope = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}  # where older config files have it
    with pytest.raises(CheckpointError, match="rope_scaling"):
        Decoder.load(changed("rope", models["llama"][1], **rope))
    with pytest.raises(CheckpointError, match="type 'gpt2'"):
        Decoder.load(changed("kind", model_type="gpt2"))
    with pytest.raises(CheckpointError, match="fc1"):
        Decoder.load(changed("shape", ffn_dim=60))
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.decoder\.layers\.2"):
        Decoder.load(changed("layers", num_hidden_layers=3))
    damaged = changed("damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        Decoder.load(damaged)
    weights.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        Decoder.load(damaged)
    (damaged / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.decoder.embed_tokens.weight": "../opt/model.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="outside the folder"):
        Decoder.load(damaged)
