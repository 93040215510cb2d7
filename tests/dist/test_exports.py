"""Exports cut over two ranks by transformers' own tensor parallelism: the plan that each class carries really runs."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megacm3.convert.to_hf import Export, to_hf
from tests.helpers.distributed import run_distributed
from tests.unit.convert.conftest import build, import_hf

IDS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(3))


def load(folder: Path, ranks: int) -> torch.nn.Module:
    """The export by its auto class; cut where there is more than one rank."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    from megacm3.convert.twin import register

    register()
    config = DistributedConfig(tp_size=ranks, tp_plan="auto") if ranks > 1 else None
    return AutoModelForCausalLM.from_pretrained(folder, **({"distributed_config": config} if config else {})).eval()  # type: ignore[no-any-return]


def cut_model(folder: Path) -> tuple[torch.Tensor, torch.Tensor, list[str], dict[str, int]]:
    """Logits, generated ids, cut parameters, and bytes that this rank holds."""
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo")
    model = load(folder, dist.get_world_size())
    held = {n: p.to_local().numel() for n, p in model.named_parameters() if isinstance(p, DTensor)}
    whole = {n: p.numel() for n, p in model.named_parameters() if n in held}
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        said = model.generate(IDS[:1], max_new_tokens=6, do_sample=False)  # type: ignore[operator]
    return logits, said, sorted(n for n in held if held[n] * 2 == whole[n]), held


@pytest.mark.parametrize("kind", ["chameleon", "swin", "qwen3", "llama"])
def test_two_ranks_give_the_logits_of_one(kind: str, tmp_path: Path) -> None:
    build(kind).save_pretrained(tmp_path / "hf")  # type: ignore[operator]
    folder = to_hf(Export.of(import_hf(tmp_path / "hf", tmp_path / "native")), tmp_path / "out")
    model = load(folder, 1)
    with torch.no_grad():
        reference = model(input_ids=IDS).logits
        said = model.generate(IDS[:1], max_new_tokens=6, do_sample=False)  # type: ignore[operator]
    for logits, generated, cut, _ in run_distributed(cut_model, 2, folder=folder):
        assert (logits - reference).abs().max() < 1e-5 * reference.abs().max()
        assert torch.equal(generated, said)
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            assert {f"model.layers.{i}.{name}.weight" for i in (0, 1)} <= set(cut), (name, cut)
