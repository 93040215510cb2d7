"""Image tokenizer training on two ranks: the same steps as one rank, and one codebook for all."""

from pathlib import Path

import numpy as np
import torch

from megacm3.tokenizers.image import ImageTokenizer
from megacm3.tokenizers.image_config import load_image_config
from megacm3.tokenizers.pictures import Pictures
from megacm3.tokenizers.image_trainer import Trainer
from megacm3.tokenizers.train_image import ranks, train_image_tokenizer
from tests.helpers.distributed import run_distributed

SMALL = [
    "network.image_size=32", "network.channels=[8,16]", "network.layers_per_block=1", "network.middle_attention=false",
    "network.latent_channels=8", "network.codebook_size=32", "network.code_dim=8", "network.norm_groups=4",
    "train.batch=8", "train.lr=0.003", "train.warmup=2", "train.steps=4",
]  # fmt: skip


def pictures():
    """20 pictures of 32 pixels"""
    small = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    return Pictures(small.repeat(8, 1).repeat(8, 2), np.zeros((20, 8, 5), np.float32))


def run(folder: str, overrides: list[str], steps: int = 3) -> tuple[dict, dict]:
    """Some steps; gives the losses of the last one and all state."""
    config = load_image_config(None, [*SMALL, *overrides])
    with ranks("cpu"):
        trainer = Trainer(config, pictures(), Path(folder))
        losses = {}
        for _ in range(steps):
            losses = trainer.train_step()
    state = {name: part.state_dict() for name, part in trainer._parts().items() if "optimizer" not in name}
    return losses, {f"{part}.{name}": value for part, values in state.items() for name, value in values.items()}


def test_two_ranks_take_the_steps_of_one(tmp_path):
    # Without the codebook, whose start draws random latents, the arithmetic is the same but for the order of sums.
    overrides = ["quantizer.start=9", "loss.adversarial=0.5", "loss.adversarial_start=1"]
    _, before = run(str(tmp_path), overrides, 0)
    _, one = run(str(tmp_path), overrides)
    for _, two in run_distributed(run, 2, folder=str(tmp_path), overrides=overrides):
        for part in ("network", "discriminator"):
            names = [name for name in one if name.startswith(part)]
            step = sum((one[name] - before[name]).square().sum() for name in names).sqrt()
            apart = sum((one[name] - two[name]).square().sum() for name in names).sqrt()
            # Adam turns rounding of gradients near zero into whole steps, hence not 1e-6.
            assert apart < 0.02 * step, (part, float(apart / step))


def test_ranks_share_one_codebook(tmp_path):
    (_, first), (_, second) = run_distributed(run, 2, folder=str(tmp_path), overrides=["quantizer.start=1"])
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["quantizer._codebook.embed"].abs().sum() > 0


def whole(folder: str) -> dict:
    """A run to its end."""
    config = load_image_config(None, [*SMALL, "train.seconds=60"])
    return train_image_tokenizer(config, pictures(), Path(folder) / "t", job="a")


def test_rank_0_writes_the_tokenizer(tmp_path):
    first, second = run_distributed(whole, 2, folder=str(tmp_path))
    assert first["steps"] == 4 and second == {}
    assert ImageTokenizer.load(tmp_path / "t").codebook_size == 32
