"""A step of the image tokenizer's training, and the state between two of them.

vector-quantize-pytorch holds the codebook while training (k-means start, moving averages, replacement of dead codes);
at the end its entries become the VQModel's. Gradients are averaged over the ranks. A step is a function
of seed and number, so that a stopped run continues as if it had not stopped.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import VQModel
from torch import Tensor, nn

from megacm3.command import seed_from
from megacm3.errors import ConfigError, DataError, Diverged
from megacm3.files import new_file
from megacm3.tokenizers.image import to_unit, torch_device
from megacm3.tokenizers.image_config import ImageTokenizerConfig
from megacm3.tokenizers.image_losses import FeatureDistance, PatchDiscriminator, adaptive_weight, discriminator_loss
from megacm3.tokenizers.image_network import build_network, build_quantizer
from megacm3.tokenizers.pictures import Pictures

_LATENTS_PER_CODE, _START_BATCHES = 8, 64
"""Latents for each code that k-means starts from, and the batches that are encoded for them at most."""


class Trainer:
    """The state of a training run and its step."""

    def __init__(self, config: ImageTokenizerConfig, pictures: Pictures, work: Path) -> None:
        self.config, self.pictures, self.work = config, pictures, work
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        train = config.train
        if train.batch % self.world:
            raise ConfigError(f"train.batch = {train.batch} is not divisible by {self.world} ranks")
        own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if train.device == "cuda" else train.device
        self.device = torch_device(own)
        if train.threads:
            torch.set_num_threads(train.threads)
        torch.manual_seed(seed_from("image tokenizer", train.seed))
        self.network = build_network(config.network).to(self.device)
        side = config.network.image_size // 2 ** (len(config.network.channels) - 1)
        self.quantizer = build_quantizer(config.quantizer, config.network, train.batch * side * side).to(self.device)
        self.optimizer = self._adam(self.network)
        self.discriminator = PatchDiscriminator().to(self.device) if config.loss.adversarial > 0 else None
        self.discriminator_optimizer = self._adam(self.discriminator) if self.discriminator else None
        self.features = FeatureDistance(config.loss.perceptual_path).to(self.device) if config.loss.perceptual else None
        self.step = 0
        self.elapsed = 0.0
        """Seconds of training so far, earlier runs included."""

    def _adam(self, module: nn.Module) -> torch.optim.Optimizer:
        train = self.config.train
        parameters = [p for p in module.parameters() if p is not self.network.quantize.embedding.weight]
        betas = (train.betas[0], train.betas[1])
        return torch.optim.AdamW(parameters, lr=train.lr, betas=betas, weight_decay=train.weight_decay)

    def progress(self) -> float:
        """Share of the schedule that is done, by steps or seconds, whatever is further."""
        train = self.config.train
        by_time = self.elapsed / train.seconds if train.seconds else 0.0
        return min(1.0, max(self.step / train.steps, by_time))

    def rate(self) -> float:
        """Learning rate of the next step: linear warm-up, then cosine to final_lr."""
        train = self.config.train
        cosine = 0.5 * (1 + math.cos(math.pi * self.progress()))
        return (
            train.lr
            * min(1.0, (self.step + 1) / max(1, train.warmup))
            * (train.final_lr + (1 - train.final_lr) * cosine)
        )

    def rows(self, step: int) -> np.ndarray:
        """int64 [batch / ranks]: this rank's pictures of a step; each epoch is a keyed permutation."""
        train, count = self.config.train, len(self.pictures)
        places = np.arange(step * train.batch, (step + 1) * train.batch)[self.rank :: self.world]
        rows = []
        for epoch in np.unique(places // count):
            generator = np.random.Generator(np.random.PCG64(seed_from("pictures", train.seed, int(epoch))))
            order = generator.permutation(count)
            rows.append(order[places[places // count == epoch] % count])
        return np.concatenate(rows)

    def batch(self, step: int) -> Tensor:
        """uint8 [batch / ranks, s, s, 3]: this rank's pictures of a step."""
        return torch.from_numpy(self.pictures.pixels[self.rows(step)])

    def weights(self, step: int) -> Tensor:
        """float32 [batch / ranks, 1, s, s]: 1, and more inside regions, for a step's pixels."""
        size, share = self.config.network.image_size, self.config.loss.regions
        boxes = torch.from_numpy(self.pictures.regions[self.rows(step)])[..., None, None]
        place = torch.arange(size) + 0.5
        across = (boxes[:, :, 0] <= place) & (place < boxes[:, :, 2])
        down = (boxes[:, :, 1] <= place[:, None]) & (place[:, None] < boxes[:, :, 3])
        return 1 + share * (boxes[:, :, 4] * (across & down)).sum(1, keepdim=True)

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """float [n, 3, s, s] -> (reconstruction, commitment loss)."""
        latents = self.network.encode(x).latents
        if self.step < self.config.quantizer.start:
            return self.network.decode(latents, force_not_quantize=True).sample, latents.new_zeros(())
        if self.step == self.config.quantizer.start and self.config.quantizer.kmeans:
            self._start_codebook(latents)
        quantized, _, commitment = self.quantizer(latents)
        return self.network.decode(quantized, force_not_quantize=True).sample, commitment.sum()

    @torch.no_grad()
    def _start_codebook(self, latents: Tensor) -> None:
        # One batch may hold fewer latents than there are codes; k-means wants several for each.
        need = _LATENTS_PER_CODE * self.config.network.codebook_size // self.world
        found, step = [latents], self.step
        while sum(part.numel() // part.shape[1] for part in found) < need and len(found) < _START_BATCHES:
            step += 1
            found.append(self.network.encode(to_unit(self.batch(step).to(self.device))).latents)
        self.quantizer(torch.cat(found))

    def train_step(self) -> dict[str, float]:
        """One optimizer step; gives the losses. Raises Diverged when a loss is not finite."""
        # Dropout has no part here; this keys k-means and the replacement of dead codes.
        torch.manual_seed(seed_from("step", self.config.train.seed, self.step))
        loss = self.config.loss
        x = to_unit(self.batch(self.step).to(self.device))
        y, commitment = self.reconstruct(x)
        weights = self.weights(self.step).to(self.device) if loss.regions else 1.0
        pixels = loss.l1 * (weights * (x - y).abs()).mean() + loss.l2 * (weights * (x - y).square()).mean()
        if self.features is not None:
            pixels = pixels + loss.perceptual * self.features(x, y)
        total = pixels + commitment
        figures = {"reconstruction": pixels, "commitment": commitment}
        adversarial = self.discriminator is not None and self.step >= loss.adversarial_start
        if adversarial:
            assert self.discriminator is not None
            fooled = -self.discriminator(y).mean()
            weight = adaptive_weight(pixels, fooled, self.network.decoder.conv_out.weight, self._mean)
            total = total + loss.adversarial * weight * fooled
            figures["adversarial"] = fooled
        if not torch.isfinite(total):
            raise Diverged(f"step {self.step}: the loss is {float(total)}; lower train.lr")
        self._apply(total, self.network, self.optimizer)
        if adversarial:
            figures["discriminator"] = self._discriminate(x, y.detach())
        self.step += 1
        return {name: float(value.detach()) for name, value in figures.items()}

    def _discriminate(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.discriminator is not None and self.discriminator_optimizer is not None
        loss = discriminator_loss(self.discriminator(x), self.discriminator(y))
        self._apply(loss, self.discriminator, self.discriminator_optimizer)
        return loss

    def _apply(self, loss: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p in parameters if self.world > 1 else ():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad)
            p.grad /= self.world
        if self.config.train.clip:
            nn.utils.clip_grad_norm_(parameters, self.config.train.clip)
        for group in optimizer.param_groups:
            group["lr"] = self.rate()
        optimizer.step()

    def _mean(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value)
            value = value / self.world
        return value

    def _parts(self) -> dict[str, Any]:
        parts = {"network": self.network, "quantizer": self.quantizer, "optimizer": self.optimizer}
        if self.discriminator is not None:
            parts |= {"discriminator": self.discriminator, "discriminator_optimizer": self.discriminator_optimizer}
        return parts

    def save(self, job: str) -> None:
        """Write the state to `work`, from rank 0."""
        if self.rank == 0:
            state = {name: part.state_dict() for name, part in self._parts().items()}
            with new_file(self.work / "state.pt") as temporary:
                torch.save(state | {"step": self.step, "elapsed": self.elapsed, "job": job}, temporary)

    def load(self, job: str) -> bool:
        """Continue from the state in `work`, if there is one of the same job."""
        path = self.work / "state.pt"
        if not path.is_file():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["job"] != job:
            raise DataError(f"{path} belongs to a run with other settings or inputs; remove {self.work} or --overwrite")
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step, self.elapsed = state["step"], state["elapsed"]
        return True

    def finish(self) -> VQModel:
        """The network with the learned codebook, on the CPU."""
        with torch.no_grad():
            self.network.quantize.embedding.weight.copy_(self.quantizer.codebook)
        return self.network.to("cpu", memory_format=torch.contiguous_format).eval()
