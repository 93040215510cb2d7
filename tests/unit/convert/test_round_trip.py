"""Hugging Face -> native -> Hugging Face: byte-equal at every layout, for every class, with equal logits on the way."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megacm3.checkpoint import reshard as reshard_module
from megacm3.checkpoint.reader import Checkpoint
from megacm3.convert.export_weights import shards
from megacm3.convert.to_hf import Export, to_hf
from megacm3.convert.verify import TOLERANCE, compare, hf_logits, random_batch, trainer_logits
from megacm3.errors import CheckpointError
from megacm3.tokenizers.vocabulary import Vocabulary
from tests.helpers.tiny_models import write_sidecar
from tests.unit.convert.conftest import KINDS, assert_byte_equal, build, import_hf, tensors

Folders = Callable[[str], Path]


@pytest.mark.parametrize("kind", KINDS)
def test_byte_equal_at_every_layout(
    kind: str, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reshard_module, "CHUNK", 2048)  # many chunks a tensor
    source = folders(kind)
    for tensor, pipeline in ((1, 1), (2, 1), (1, 2), (2, 2)):
        native = import_hf(source, tmp_path / f"native{tensor}{pipeline}", tensor, pipeline)
        back = to_hf(Export.of(native), tmp_path / f"back{tensor}{pipeline}", shard_bytes=20_000)
        assert_byte_equal(source, back)
        if (tensor, pipeline) == (2, 2):  # what only the class has goes along into another layout
            again = reshard_module.reshard(native, tmp_path / "resharded", 1, 2)
            assert_byte_equal(source, to_hf(Export.of(again), tmp_path / "back-resharded"))
        before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, back))
        assert {key: after[key] for key in before} == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_the_class_s_own(kind: str, dtype: str, tmp_path: Path) -> None:
    """The reference here is the model object itself, not our streamed run of it."""
    model = build(kind).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "hf")  # type: ignore[operator]
    native = Checkpoint(import_hf(tmp_path / "hf", tmp_path / "native", 2, 1))
    config = Export.of(native.folder).config
    batch = random_batch(config.model.vocab_size, 96)
    (ours,), (streamed,) = trainer_logits(native, config, [batch]), hf_logits(tmp_path / "hf", [batch])
    with torch.no_grad():
        # Not model.float(): its rotary table went through bf16.
        wide = type(model).from_pretrained(tmp_path / "hf", dtype=torch.float32)  # type: ignore[attr-defined]
        reference = wide(input_ids=batch).logits
    shown = reference > torch.finfo(torch.float32).min  # Chameleon's class hides its image ids
    assert shown.any(-1).all() and (kind in ("chameleon", "swin") or shown.all())
    top = reference[shown].abs().max()
    assert (ours - reference)[shown].abs().max() < TOLERANCE * top
    assert (streamed - reference)[shown].abs().max() < TOLERANCE * top
    assert compare(native, config, tmp_path / "hf").largest < TOLERANCE


def test_shards_are_cut_by_size_and_indexed(folders: Folders, tmp_path: Path) -> None:
    native = import_hf(folders("qwen3"), tmp_path / "native")
    back = to_hf(Export.of(native), tmp_path / "back", shard_bytes=20_000)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in back.glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors(back).values())
    sizes = [sum(entry.bytes for entry in part) for part in shards(_entries(back), 20_000)]
    assert all(size <= 20_000 for size in sizes if size != max(sizes))


def _entries(folder: Path) -> list:  # type: ignore[type-arg]
    from megacm3.checkpoint.tensors import Entry

    return [Entry(name, value.dtype, tuple(value.shape)) for name, value in tensors(folder).items()]


def test_transformers_loads_and_generates(folders: Folders, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for kind in ("opt", "llama", "qwen3"):
        back = to_hf(Export.of(import_hf(folders(kind), tmp_path / f"{kind}-n")), tmp_path / kind, shard_bytes=20_000)
        model, info = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        prompt = torch.tensor([[5, 6, 7]])
        original = AutoModelForCausalLM.from_pretrained(folders(kind))
        told = [m.generate(prompt, max_new_tokens=8, do_sample=False) for m in (model, original)]
        assert torch.equal(*told)


def test_opt_positions_stand_two_rows_lower(folders: Folders, tmp_path: Path) -> None:
    native = Checkpoint(import_hf(folders("opt"), tmp_path / "native"))
    rows = tensors(folders("opt"))["model.decoder.embed_positions.weight"]
    from megacm3.checkpoint.boxes import Box

    out = torch.empty(1, 32)
    native.read("param", "positions.weight", Box((5, 0), (1, 32)), out)
    assert torch.equal(out[0], rows[7])


def test_equal_rows_of_a_q_norm_become_groups(folders: Folders, tmp_path: Path) -> None:
    """Released 34B: one row a shard, repeated for its heads; 7B: one row in all; a fine-tune: a row for each head."""
    from safetensors.torch import load_file, save_file

    for groups, k_rows in ((1, 1), (2, 2), (4, 2)):
        folder = tmp_path / f"hf{groups}"
        build("chameleon").save_pretrained(folder)  # type: ignore[operator]
        values = load_file(folder / "model.safetensors")
        for name in [name for name in values if "q_norm" in name or "k_norm" in name]:
            heads = len(values[name])
            rows = min(groups, heads)
            values[name] = values[name][:rows].repeat_interleave(heads // rows, 0).contiguous()
        save_file(values, folder / "model.safetensors", {"format": "pt"})
        native = Checkpoint(import_hf(folder, tmp_path / f"native{groups}", 2, 1))
        assert native.config["model"]["qk_norm_groups"] == groups
        assert native.shapes["layers.0.attn.q_norm.weight"] == (groups, 8)
        assert native.shapes["layers.0.attn.k_norm.bias"] == (k_rows, 8)
        config = Export.of(native.folder).config
        assert compare(native, config, folder).largest < TOLERANCE
        assert_byte_equal(folder, to_hf(Export.of(native.folder), tmp_path / f"back{groups}"))


@pytest.mark.parametrize(
    "kind, tensor", [("llama", "q_proj"), ("chameleon", "k_norm.bias"), ("opt", "embed_positions")]
)
def test_the_gate_sees_one_wrong_tensor(kind: str, tensor: str, copy: Folders, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy(kind)
    native = Checkpoint(import_hf(folder, tmp_path / "native"))
    values = load_file(folder / "model.safetensors")
    name = next(name for name in values if tensor in name)
    values[name] = values[name].flip(0) if values[name].ndim == 1 else values[name].roll(1, 0).contiguous()
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="differ from the trainer's by"):
        compare(native, Export.of(native.folder).config, folder)


def test_a_refusing_gate_leaves_the_old_export(folders: Folders, tmp_path: Path) -> None:
    export = Export.of(import_hf(folders("llama"), tmp_path / "native"))
    to_hf(export, tmp_path / "hf")
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}

    def refuse(folder: Path) -> None:
        assert (folder / "model.safetensors").is_file() and folder != tmp_path / "hf"
        raise CheckpointError("no")

    with pytest.raises(CheckpointError):
        to_hf(export, tmp_path / "hf", replace=True, gate=refuse)
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "native"]


def test_an_import_still_says_that_a_model_was_tuned_on_answers(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """megacm3.json's `answers` decides how the model is asked; it goes along through import, layout and export."""
    source = copy("opt")
    write_sidecar(source, Vocabulary.cm3leon(244, 32, 24, sentinels=8, image_tokens=16))
    for answers in (True, False):
        tree = json.loads((source / "megacm3.json").read_text()) | {"answers": answers}
        (source / "megacm3.json").write_text(json.dumps(tree))
        native = import_hf(source, tmp_path / f"native{answers}")
        cut = reshard_module.reshard(native, tmp_path / f"cut{answers}", 2, 1)
        back = to_hf(Export.of(cut), tmp_path / f"back{answers}")
        assert json.loads((back / "megacm3.json").read_text())["answers"] is answers
