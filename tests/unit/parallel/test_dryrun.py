"""Real presets on the meta device under a fake process group: what ranks hold, compute and hand to collectives."""

import pytest

from megacm3.errors import ConfigError
from megacm3.parallel.dryrun import DryRun, count_once, dry_run
from megacm3.planning.counts import parameters, sequence_flops
from megacm3.planning.layout import layout_of, rank_parameters
from megacm3.planning.traffic import tensor_traffic
from megacm3.resolve import load_config

SP = "parallel.sequence=true"


def tried(world: int, preset: str, *overrides: str) -> DryRun:
    """A dry run whose parameters, FLOPs and collectives are the estimate's, to the digit."""
    config = load_config(None, [f"model.preset={preset}", *overrides])
    layout, found = layout_of(config, world), dry_run(config, world)
    assert found.parameters == parameters(config.model)
    assert len(found.reports) == layout.tensor * layout.pipeline
    for report in found.reports:
        assert report.parameters == rank_parameters(config.model, layout, report.stage)
        if report.tensor_rank:
            continue
        m = layout.micro_batches
        expected = tensor_traffic(config, layout, report.stage)
        assert report.count == {item.operation: item.count // m for item in expected}
        assert report.bytes == {item.operation: item.bytes // m for item in expected}
    if layout.recompute != "selective":  # what the plain attention of this device leaves out of a repetition
        flops = sum(report.flops for report in found.reports) * layout.tensor
        assert flops == layout.micro_batch * sequence_flops(config.model, layout.recompute)
    return found


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("sequence", ["parallel.sequence=false", SP])
@pytest.mark.parametrize("preset", ["tiny_cm3leon", "tiny_chameleon_7b", "tiny_chameleon_34b", "tiny_modern"])
def test_every_family_and_cut(preset: str, sequence: str, recompute: str) -> None:
    tried(
        4,
        preset,
        "parallel.tensor=2",
        sequence,
        "parallel.pipeline=2",
        f"parallel.recompute={recompute}",
        "train.micro_batch=2",
    )


@pytest.mark.parametrize("sequence", ["parallel.sequence=false", SP])
def test_dropout_makes_recomputation_run_to_the_end(sequence: str) -> None:
    tried(4, "tiny_chameleon_7b", "parallel.tensor=4", sequence, "parallel.recompute=full", "model.dropout=0.1")


def test_one_rank_has_no_collectives() -> None:
    assert tried(1, "tiny_modern").reports[0].count == {}


@pytest.mark.timeout(60)
def test_chameleon_34b_on_1024_gpus() -> None:
    found = tried(1024, "chameleon_34b", "parallel.tensor=8", "parallel.pipeline=4", SP, "parallel.recompute=full")
    assert found.parameters == 34_293_448_704
    assert (found.ranks, len(found.reports)) == (1024, 32)
    assert found.seconds < 60


@pytest.mark.parametrize("preset", ["cm3leon_7b", "chameleon_7b", "modern_1b"])
def test_other_presets(preset: str) -> None:
    tried(64, preset, "parallel.tensor=4", SP, "parallel.pipeline=2")


def test_a_tensor_that_no_rank_holds_whole_is_named() -> None:
    found = tried(2, "tiny_chameleon_7b", "parallel.tensor=2")
    found.reports[1].parts = [part for part in found.reports[1].parts if part.name != "layers.2.mlp.down.weight"]
    with pytest.raises(ConfigError, match=r"layers\.2\.mlp\.down\.weight has 8,192 numbers; ranks hold 4,096"):
        count_once(found.reports)


def test_nothing_of_the_fake_world_stays() -> None:
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    buffer = parallel_state._GLOBAL_MEMORY_BUFFER
    tried(2, "tiny_cm3leon", "parallel.tensor=2", SP)
    assert not dist.is_initialized()
    assert torch.cuda.current_device() == torch.device("cpu") and parallel_state._GLOBAL_MEMORY_BUFFER is buffer
    assert not torch.empty(1).is_meta
