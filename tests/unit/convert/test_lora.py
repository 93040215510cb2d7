"""Adapters on their way out: merged into an export, and as PEFT's own adapter over the base model's."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megacm3.checkpoint.boxes import Box, whole
from megacm3.checkpoint.merged import Merged, open_merged
from megacm3.checkpoint.reader import Checkpoint
from megacm3.checkpoint.reshard import reshard, write_checkpoint
from megacm3.config import Config, LoraConfig
from megacm3.convert.names import export_kind, names
from megacm3.convert.to_hf import Export, to_hf
from megacm3.convert.verify import TOLERANCE, compare, hf_logits, random_batch
from tests.helpers.checkpoints import tiny

ROOT = Path(__file__).resolve().parents[3]
RANK, ALPHA = 4, 12.0
FAMILIES = {
    "tiny_cm3leon": ["q", "v", "o", "up", "down"],
    "tiny_modern": ["q", "k", "v", "o", "gate", "up", "down"],
    "tiny_chameleon_34b": ["k", "gate"],
}
Values = dict[tuple[str, str], torch.Tensor]


def write_lora(preset: str, folder: Path, dtype: torch.dtype = torch.float32, adapted: bool = True) -> Config:
    """A checkpoint with adapters whose products are not small; moments and masters of them alone."""
    config = tiny(preset, init_residual="scaled")
    model, generator = config.model, torch.Generator().manual_seed(0)
    table = {name.logical: name.shape for name in names(export_kind(model), model)}
    values: Values = {("param", name): torch.randn(shape, generator=generator) * 0.1 for name, shape in table.items()}
    for name, shape in list(table.items()) if adapted else []:
        if name.split(".")[-2] in FAMILIES[preset]:
            stem = name.removesuffix("weight")
            values["param", stem + "lora_a"] = torch.randn(RANK, shape[1], generator=generator) * 0.2
            values["param", stem + "lora_b"] = torch.randn(shape[0], RANK, generator=generator) * 0.2
    kinds = {"param": dtype} | ({"exp_avg": torch.float32} if adapted else {})
    kinds |= {"master": torch.float32} if dtype != torch.float32 and adapted else {}
    shapes = {name: tuple(value.shape) for _, name in values for value in [values["param", name]]}
    trained = {name: [str(whole(shape))] for name, shape in shapes.items() if ".lora_" in name}
    lora = LoraConfig(rank=RANK, alpha=ALPHA, matrices=FAMILIES[preset])
    train = dataclasses.replace(config.train, parameters="lora" if adapted else "all")
    config = dataclasses.replace(config, lora=lora, train=train)

    def read(kind: str, name: str, box: Box, out: torch.Tensor) -> None:
        value = values["param", name][box.within(whole(shapes[name]))]
        out.copy_(value if kind != "exp_avg" else value.square())

    settings = {"step": 1, "optimizer_step": 1, "state": {"step": 1}, "inputs": {}}
    trained_or_all = trained if adapted else None
    write_checkpoint(folder, kinds=kinds, shapes=shapes, read=read, config=config, trained=trained_or_all, **settings)
    return config


@pytest.mark.parametrize("dtype", ["", "bfloat16", "float32"])
@pytest.mark.parametrize("preset", ["tiny_cm3leon", "tiny_modern"])
def test_an_export_is_the_model_with_its_adapters(preset: str, dtype: str, tmp_path: Path) -> None:
    """The gate compares it with adapters that run as such; it must not be the base alone either."""
    write_lora(preset, tmp_path / "step", torch.bfloat16 if dtype == "float32" else torch.float32)
    export = Export.of(tmp_path / "step", dtype)
    to_hf(export, tmp_path / "hf")
    found = compare(export.checkpoint, export.config, tmp_path / "hf", kind=export.source_kind, dtype=export.dtype)
    assert found.largest < TOLERANCE
    write_lora(preset, tmp_path / "base", adapted=False)
    (tuned,), (base,) = (
        hf_logits(folder, [random_batch(export.config.model.vocab_size, 32)])
        for folder in (tmp_path / "hf", to_hf(Export.of(tmp_path / "base"), tmp_path / "base_hf"))
    )
    assert (tuned - base).abs().max() > 0.05 * base.abs().max()


@pytest.mark.parametrize("preset", FAMILIES)
def test_any_box_is_read_merged(preset: str, tmp_path: Path) -> None:
    write_lora(preset, tmp_path / "step", torch.bfloat16)
    merged, apart = open_merged(tmp_path / "step"), Checkpoint(tmp_path / "step")
    assert isinstance(merged, Merged) and not any("lora" in name for name in merged.shapes)
    for name, shape in merged.shapes.items():
        wanted = torch.empty(shape)
        apart.read("param", name, whole(shape), wanted)
        stem = name.removesuffix("weight")
        if stem + "lora_a" in apart.shapes:
            a, b = (torch.empty(apart.shapes[stem + end]) for end in ("lora_a", "lora_b"))
            for end, factor in (("lora_a", a), ("lora_b", b)):
                apart.read("master", stem + end, whole(apart.shapes[stem + end]), factor)
            wanted += ALPHA / RANK * b @ a
        for kind in ("param", "master"):
            box = Box(tuple(n // 3 for n in shape), tuple(n - n // 3 for n in shape))
            out = torch.empty(box.shape)
            merged.read(kind, name, box, out)
            assert torch.allclose(out, wanted[box.within(whole(shape))], rtol=1e-5, atol=1e-6), (kind, name)


def test_reshard_cuts_adapters_as_the_layers_are_cut(tmp_path: Path) -> None:
    """Tensor ranks hold what their layers hold; moments lie beside what trained, nowhere else; back again bitwise."""
    write_lora("tiny_modern", tmp_path / "step", torch.bfloat16)
    cut = Checkpoint(reshard(tmp_path / "step", tmp_path / "cut", 2, 2))
    cut.check_coverage()
    assert len(cut.boxes("param", "layers.0.attn.q.lora_b")) == 2 == len(cut.boxes("param", "layers.0.attn.o.lora_a"))
    assert len(cut.boxes("param", "layers.0.attn.q.lora_a")) == 1 == len(cut.boxes("param", "layers.0.attn.o.lora_b"))
    assert not cut.boxes("exp_avg", "embed.weight") and cut.boxes("exp_avg", "layers.1.mlp.gate.lora_b")
    back = Checkpoint(reshard(tmp_path / "cut", tmp_path / "back", 1, 1))
    first = Checkpoint(tmp_path / "step")
    assert back.trained == first.trained and back.kinds == first.kinds
    for name, shape in first.shapes.items():
        for kind in first.kinds if name in (first.trained or {}) else ("param",):
            values = [torch.empty(shape, dtype=first.kinds[kind]) for _ in range(2)]
            first.read(kind, name, whole(shape), values[0])
            back.read(kind, name, whole(shape), values[1])
            assert torch.equal(*values), (kind, name)


@pytest.mark.parametrize("preset", ["tiny_cm3leon", "tiny_modern"])
def test_peft_loads_the_adapter_over_the_base(preset: str, tmp_path: Path) -> None:
    """PEFT's own model of base and adapter gives the merged export's logits."""
    peft = pytest.importorskip("peft", reason="compared with PEFT itself")
    import transformers

    config = write_lora(preset, tmp_path / "step")
    merged = to_hf(Export.of(tmp_path / "step"), tmp_path / "merged")
    lone = Checkpoint(tmp_path / "step")
    lone.shapes = {name: shape for name, shape in lone.shapes.items() if ".lora_" not in name}
    base = to_hf(dataclasses.replace(Export.of(tmp_path / "step"), checkpoint=lone), tmp_path / "base")
    command = [sys.executable, "tools/convert_checkpoint.py", "to-hf", "--checkpoint", tmp_path / "step"]
    command += ["--adapter", base, "--output", tmp_path / "adapter"]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"adapters of {config.model.layers * len(FAMILIES[preset])} matrices" in done.stdout
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    batch = random_batch(config.model.vocab_size, 32)
    (wanted,) = hf_logits(merged, [batch])
    with torch.no_grad():
        found = tuned(input_ids=batch).logits
    assert (found - wanted).abs().max() < TOLERANCE * wanted.abs().max()
    with torch.no_grad(), tuned.disable_adapter():
        assert (tuned(input_ids=batch).logits - wanted).abs().max() > 0.05 * wanted.abs().max()
