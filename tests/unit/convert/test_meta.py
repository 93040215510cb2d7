"""Chameleon in Meta's form, one and several shards, and a fork's rows of q/k norm."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megacm3.checkpoint.reader import Checkpoint
from megacm3.checkpoint.reshard import reshard
from megacm3.convert.carried import tokenizers_of_release
from megacm3.convert.from_hf import from_hf, opened
from megacm3.convert.meta import MetaFolder, half_split, meta_logits
from megacm3.convert.to_hf import Export, to_hf
from megacm3.convert.verify import TOLERANCE, compare, random_batch
from megacm3.errors import CheckpointError, DataError
from megacm3.tokenizers.text import TextTokenizer
from megacm3.training.start import open_start
from tests.helpers.tiny_models import TEXTS
from tests.unit.convert.conftest import assert_byte_equal, build, import_hf

HEADS, KV_HEADS, SIZE = 4, 2, 8


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `half_split`, element by element."""
    out = torch.empty_like(rows)
    for head in range(heads):
        for i in range(SIZE // 2):
            out[head * SIZE + 2 * i] = rows[head * SIZE + i]
            out[head * SIZE + 2 * i + 1] = rows[head * SIZE + SIZE // 2 + i]
    return out


def chameleon(kind: str, groups: int, folder: Path) -> Any:
    """transformers' tiny model whose q/k norms have `groups` different rows, saved."""
    model: Any = build(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                heads = len(parameter)
                parameter.copy_(parameter[:groups].repeat_interleave(heads // groups, 0))
    model.save_pretrained(folder)
    return model


def save_meta(folder: Path, target: Path, shards: int) -> None:
    """A transformers folder in Meta's form."""
    from megacm3.convert.meta import _FORMS, _TOP

    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    out: list[dict[str, torch.Tensor]] = [{"rope.freqs": torch.zeros(4)} for _ in range(shards)]
    names = dict(_TOP)
    for i in range(config["num_hidden_layers"]):
        names |= {f"model.layers.{i}.{hf}": (f"layers.{i}.{meta}", dim) for hf, (meta, dim) in _FORMS.items()}
    for hf, (meta, dim) in names.items():
        value = state[hf]
        if "self_attn.q_norm" in hf or "self_attn.k_norm" in hf:
            rows = value.chunk(shards)
            pieces = [interleaved(row[0][:, None], 1)[:, 0] for row in rows]
        else:
            if ".q_proj." in hf or ".k_proj." in hf:
                value = interleaved(value, HEADS if ".q_proj." in hf else KV_HEADS)
            pieces = [value] * shards if dim is None else list(value.chunk(shards, dim))
        for shard, piece in zip(out, pieces, strict=True):
            shard[meta] = piece.clone()
    target.mkdir(parents=True)
    for i, shard in enumerate(out):
        torch.save(shard, target / ("consolidated.pth" if shards == 1 else f"consolidated.{i:02d}.pth"))
    params = {"dim": 32, "n_layers": 2, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "norm_eps": 1e-5, "multiple_of": 16}
    params |= {"qk_normalization": True, "swin_norm": config["swin_norm"], "rope_theta": 10000.0}
    (target / "params.json").write_text(json.dumps({"model_parallel_size": shards, "model": params}))
    tokenizer = target.parent.parent / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "text_tokenizer.json").write_text(json.dumps({"model": {"vocab": config["vocabulary_map"]}}))


@pytest.mark.parametrize("kind, shards", [("chameleon", 1), ("swin", 2)])
def test_imports_are_transformers_own(kind: str, shards: int, tmp_path: Path) -> None:
    model = chameleon(kind, shards, tmp_path / "hf")
    meta = tmp_path / "release" / "models" / "7b"
    save_meta(tmp_path / "hf", meta, shards)
    batch = random_batch(700, 64)
    with torch.no_grad():
        reference = model(input_ids=batch).logits
    shown = reference > torch.finfo(torch.float32).min
    with opened(meta, tmp_path / "native", trust_pickle=True) as source:
        assert isinstance(source, MetaFolder)
        (own,) = meta_logits(source, [batch])
        assert (own - reference)[shown].abs().max() < TOLERANCE * reference[shown].abs().max()
        native = Checkpoint(from_hf(source, tmp_path / "native", 2, 1))
        assert native.config["model"]["qk_norm_groups"] == shards
        verdict = compare(native, Export.of(native.folder).config, meta, source)
        assert verdict.largest < TOLERANCE
    assert not list(tmp_path.glob(".native*"))
    # The image tokenizer is a file of its own in a release; all else is what transformers has.
    back, original = tmp_path / "back", tmp_path / "stripped"
    to_hf(Export.of(native.folder), back)
    values = {
        name: value for name, value in load_file(tmp_path / "hf" / "model.safetensors").items() if "vqmodel" not in name
    }
    original.mkdir()
    save_file(values, original / "model.safetensors")
    found = {n: v for n, v in load_file(back / "model.safetensors").items() if "vqmodel" not in n}
    save_file(found, back / "model.safetensors")
    assert_byte_equal(original, back)


DDCONFIG = """
model:
  params:
    n_embed: 32
    embed_dim: 4
    ddconfig: {double_z: false, z_channels: 4, resolution: 16, in_channels: 3, out_ch: 3, ch: 32, ch_mult: [1, 1],
               num_res_blocks: 1, attn_resolutions: [], dropout: 0.0}
"""


def test_a_whole_release_in_one_go(tmp_path: Path) -> None:
    """Two shards and the image tokenizer beside them become one step; its export encodes and decodes pictures."""
    from transformers import ChameleonForConditionalGeneration

    from megacm3.tokenizers.image import ImageTokenizer, to_unit
    from megacm3.tokenizers.image_config import NetworkConfig
    from tests.unit.tokenizers.test_taming import Original

    chameleon("swin", 2, tmp_path / "hf")
    release = tmp_path / "release"
    save_meta(tmp_path / "hf", release / "models" / "34b", 2)
    torch.manual_seed(5)
    config = NetworkConfig(
        image_size=16,
        channels=[32, 32],
        layers_per_block=1,
        attention_levels=[],
        latent_channels=4,
        codebook_size=32,
        code_dim=4,
    )
    original = Original(config, gumbel=False)
    pixels = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    codebook = original.quantize.embedding.weight
    with torch.no_grad():
        latents = original.quant_conv(original.encoder(to_unit(pixels))).permute(0, 2, 3, 1).reshape(-1, 4)
        codebook.copy_(latents[::6][:32])
        theirs = torch.cdist(latents, codebook).argmin(1).view(3, 64)
    # A Lightning checkpoint: the weights lie among objects, and beside them those of the loss.
    state = original.state_dict() | {"loss.discriminator.weight": torch.ones(3)}
    torch.save({"state_dict": state, "callbacks": {"best": Path("x")}}, release / "tokenizer" / "vqgan.ckpt")
    (release / "tokenizer" / "vqgan.yaml").write_text(DDCONFIG)

    native = import_hf(release / "models" / "34b", tmp_path / "native", 2, 2, trust_pickle=True)
    assert Checkpoint(native, verify="sha256").state["vocabulary"]["image_tokens"] == 64
    kept = ImageTokenizer.load(native / "image_tokenizer").fingerprint
    assert open_start(native).tokenizers == {"image_tokenizer": kept}
    for step in (native, reshard(native, tmp_path / "resharded", 1, 1)):
        folder = to_hf(Export.of(step), tmp_path / f"back-{step.name}")
        model, info = ChameleonForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        tokenizer = ImageTokenizer.load(folder / "image_tokenizer")
        codes = tokenizer.encode(pixels)
        with torch.no_grad():
            ids = model.model.get_image_tokens(to_unit(pixels))
        assert len(codes.unique()) > 16 and torch.equal(torch.as_tensor(codes), theirs)
        assert torch.equal(ids.view(3, 64), theirs + 4) and tokenizer.decode(codes).shape == (3, 16, 16, 3)
    (release / "tokenizer" / "vqgan.yaml").unlink()
    with pytest.raises(DataError, match=r"vqgan\.ckpt has no vqgan\.yaml beside it"):
        import_hf(release / "models" / "34b", tmp_path / "again", trust_pickle=True)
    assert not (tmp_path / "again").exists()


def test_a_release_s_text_tokenizer_comes_along(tmp_path: Path) -> None:
    from megacm3.tokenizers import chameleon_text

    text = chameleon_text.train_chameleon([*TEXTS, "how many apples? 12"], 9100)
    (tmp_path / "text_tokenizer.json").write_text(text)
    found = tokenizers_of_release(tmp_path, 9100, tmp_path / "scratch")
    assert found.keys() == {"text_tokenizer"}
    ours = TextTokenizer.load(found["text_tokenizer"])
    assert ours.size == 9100 and ours.decode(ours.encode("a red apple")) == "a red apple"


def test_rows_are_turned_back_exactly() -> None:
    rows = torch.arange(4 * SIZE * 3.0).view(4 * SIZE, 3)
    assert torch.equal(half_split(interleaved(rows, 4), 4), rows)


def test_the_gate_sees_norms_in_the_wrong_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commonest fault of converters: weights in half-split order, q/k norms still interleaved."""
    chameleon("chameleon", 1, tmp_path / "hf")
    meta = tmp_path / "release" / "models" / "7b"
    save_meta(tmp_path / "hf", meta, 1)
    with opened(meta, tmp_path / "native", trust_pickle=True) as source:
        assert isinstance(source, MetaFolder)
        monkeypatch.setattr(
            "megacm3.convert.meta.half_split", lambda rows, heads: rows if heads == 1 else half_split(rows, heads)
        )
        native = Checkpoint(from_hf(source, tmp_path / "native"))
        with pytest.raises(CheckpointError, match="differ from"):
            compare(native, Export.of(native.folder).config, meta, source)


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_pickles_are_read_only_when_trusted(tmp_path: Path) -> None:
    chameleon("chameleon", 1, tmp_path / "hf")
    meta = tmp_path / "release" / "models" / "7b"
    save_meta(tmp_path / "hf", meta, 1)
    torch.save({"state": Bomb(tmp_path / "made")}, meta / "consolidated.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.pth is a pickle: .* give --trust-pickle if you trust it"):
        import_hf(meta, tmp_path / "native")
    assert not (tmp_path / "made").exists() and not (tmp_path / "native").exists()
    with pytest.raises(CheckpointError, match=r"consolidated\.pth cannot be read: it holds no tensors"):
        import_hf(meta, tmp_path / "native", trust_pickle=True)
    assert (tmp_path / "made").exists()  # trusted means run


def test_shards_that_lack_a_tensor(tmp_path: Path) -> None:
    chameleon("chameleon", 1, tmp_path / "hf")
    meta = tmp_path / "release" / "models" / "7b"
    save_meta(tmp_path / "hf", meta, 1)
    state = torch.load(meta / "consolidated.pth", weights_only=True)
    state.pop("layers.1.attention.k_normalization.bias")
    torch.save(state, meta / "consolidated.pth")
    with pytest.raises(CheckpointError, match=r"shard 0 of 1 lacks layers\.1\.attention\.k_normalization\.bias"):
        import_hf(meta, tmp_path / "native", trust_pickle=True)


def test_one_row_a_shard_as_in_lumina_mgpt(tmp_path: Path) -> None:
    """That fork of the class keeps [shards, d]; its model_type is chameleon all the same."""
    chameleon("chameleon", 2, tmp_path / "hf")
    chameleon("chameleon", 2, tmp_path / "fork")
    values = load_file(tmp_path / "fork" / "model.safetensors")
    for name in [name for name in values if "self_attn.q_norm" in name or "self_attn.k_norm" in name]:
        values[name] = values[name][:: len(values[name]) // 2].contiguous()
    save_file(values, tmp_path / "fork" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "fork" / "config.json").read_text())
    config |= {"architectures": ["ChameleonXLLMXForConditionalGeneration"], "z_loss_weight": 1e-5}
    (tmp_path / "fork" / "config.json").write_text(json.dumps(config))
    native = Checkpoint(import_hf(tmp_path / "fork", tmp_path / "native"))
    assert native.config["model"]["qk_norm_groups"] == 2
    assert compare(native, Export.of(native.folder).config, tmp_path / "hf").largest < TOLERANCE
    assert_byte_equal(tmp_path / "hf", to_hf(Export.of(native.folder), tmp_path / "back"))
