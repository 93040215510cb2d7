"""A real run of two tensor ranks in which a copy of a replicated parameter is changed on one rank: it stops."""

from pathlib import Path
from typing import Any

import pytest

from megacm3.errors import CheckpointError
from tests.helpers.distributed import ROOT, run_distributed
from tests.helpers.stores import make_store

NAME = "layers.1.mlp_norm.weight"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config over a store of 64 small documents, with replicated norms."""
    folder = tmp_path_factory.mktemp("replicas")
    store = make_store(folder / "store", documents=64, text_size=256, codebook_size=128, image_tokens=16)
    path = folder / "config.yaml"
    path.write_text(
        f"""
model: {{preset: tiny_cm3leon, norm: rmsnorm, vocab_size: 512, sequence_length: 96}}
deepspeed: {ROOT}/ds_configs/zero0.json
parallel: {{tensor: 2, sequence: true}}
data: {{mixture: [{{store: {store}}}], packing: whole, workers: 0}}
train: {{steps: 8, micro_batch: 2, global_batch: 4, dtype: fp32, device: cpu}}
log: {{every: 1, tensorboard: false}}
"""
    )
    return path


def changed_after(path: str, overrides: list[str], step: int) -> tuple[str, int, list[str]]:
    """On a rank: train, with one number changed after `step`. (error, steps done, checkpoints)."""
    import torch

    from megacm3.parallel.cpu import choose_device, prepare
    from megacm3.resolve import load_config

    prepare(choose_device("cpu"))
    import deepspeed

    from megacm3.parallel.context import build_context
    from megacm3.parallel.replicated import replicas
    from megacm3.training.loop import train
    from megacm3.training.run import build_run
    from megacm3.training.watchdog import Watchdog

    config = load_config(path, overrides)
    deepspeed.init_distributed("gloo")
    context = build_context(config, torch.device("cpu"))
    run = build_run(config, context, Watchdog(config, context))
    inner = run.engine.train_step

    def train_step(*arguments: Any) -> Any:
        result = inner(*arguments)
        if run.step + 1 == step and context.tensor_rank == 1:
            with torch.no_grad():
                dict(replicas(run.engine.module))[NAME].view(-1)[3] += 1e-6
        return result

    run.engine.train_step = train_step  # type: ignore[method-assign]
    message = ""
    try:
        train(run)
    except CheckpointError as error:
        message = str(error)
    return message, run.step, sorted(folder.name for folder in (run.out / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(
    "overrides, stops_at, saved",
    [
        (["log.replicas_every=2", "checkpoint.every=0"], 4, []),
        (["log.replicas_every=1000", "checkpoint.every=2"], 4, ["step_000002"]),
    ],
    ids=["every second step", "before a save"],
)
def test_the_run_stops_and_names_it(
    config: Path, tmp_path: Path, overrides: list[str], stops_at: int, saved: list[str]
) -> None:
    keys = [f"train.out={tmp_path / 'out'}", *overrides]
    for message, step, found in run_distributed(changed_after, 2, path=str(config), overrides=keys, step=3):
        assert f"replicated parameters differ: {NAME} on rank 1 is not that of rank 0" in message
        assert (step, found) == (stops_at, saved)
