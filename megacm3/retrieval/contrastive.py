"""CLIP's contrastive training of an encoder on pairs in memory.

Queries at retrieval time are pictures and captions with tokens dropped, so training sees jittered pictures and captions
with tokens dropped.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from megacm3.command import progress, seed_from
from megacm3.errors import Diverged
from megacm3.retrieval.encoder import Encoder
from megacm3.retrieval.new_encoder import EncoderTraining

if TYPE_CHECKING:
    import torch


def fit(encoder: Encoder, images: np.ndarray, captions: list[str], training: EncoderTraining) -> list[float]:
    """Train `encoder` in place on pictures uint8 [n, s, s, 3] and their captions; gives the loss of each step.

    Raises Diverged when the loss is no number.
    """
    import torch

    model: Any = encoder.model.train()
    generator = torch.Generator().manual_seed(seed_from(training.seed, "encoder training"))
    # Dropout, which some models have, is the only draw from torch's own stream.
    torch.manual_seed(seed_from(training.seed, "encoder dropout"))
    tokens = encoder.tokenize(captions)
    _, groups = np.unique([caption.casefold() for caption in captions], return_inverse=True)
    group = torch.from_numpy(groups)
    groups_of_weights = _parameter_groups(model, training.weight_decay)
    optimizer = torch.optim.AdamW(groups_of_weights, lr=training.lr, betas=(0.9, 0.98), eps=1e-6)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, training))
    losses: list[float] = []
    batches = _batches(len(tokens), min(training.batch, len(tokens)), training.steps, generator)
    for rows in progress(batches, total=training.steps, unit="step", description="encoder"):
        pixels = jitter(torch.from_numpy(encoder.pixels(images[rows])), training.jitter, generator)
        ids, mask = encoder.batch_tokens([_drop(tokens[row], training.token_dropout, generator) for row in rows])
        device = model.device
        image = model.get_image_features(pixel_values=pixels.to(device)).pooler_output
        text = model.get_text_features(input_ids=ids.to(device), attention_mask=mask.to(device)).pooler_output
        loss = contrastive_loss(image, text, model.logit_scale, group[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, math.log(100.0))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise Diverged(f"the contrastive loss is {losses[-1]} at step {len(losses)}; lower --lr")
    model.eval()
    return losses


def contrastive_loss(
    image: "torch.Tensor", text: "torch.Tensor", log_scale: "torch.Tensor", group: "torch.Tensor"
) -> "torch.Tensor":
    """CLIP's symmetric cross entropy of [n, d] features. Pairs of the same `group` (int [n], same caption) are no
    negatives of each other: the target is spread evenly over them."""
    from torch.nn.functional import cross_entropy, normalize

    logits = log_scale.exp() * normalize(image, dim=-1) @ normalize(text, dim=-1).T
    same = (group[:, None] == group[None, :]).to(logits.dtype)
    target = same / same.sum(1, keepdim=True)
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def _parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    # Norms, biases and the temperature are not decayed (CLIP, Table 18).
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _rate(step: int, training: EncoderTraining) -> float:
    # Linear warm-up, then a cosine to 5 % of the peak.
    warm = min(1.0, (step + 1) / max(1, training.warmup))
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / training.steps))))


def _batches(rows: int, batch: int, steps: int, generator: "torch.Generator") -> Iterable[np.ndarray]:
    import torch

    order = torch.randperm(rows, generator=generator)
    start = 0
    for _ in range(steps):
        if start + batch > rows:
            order, start = torch.randperm(rows, generator=generator), 0
        yield order[start : start + batch].numpy()
        start += batch


def _drop(row: list[int], share: float, generator: "torch.Generator") -> list[int]:
    import torch

    kept = torch.rand(len(row), generator=generator) >= share
    return [token for token, keep in zip(row, kept.tolist(), strict=True) if keep] or row


def jitter(pixels: "torch.Tensor", amount: float, generator: "torch.Generator") -> "torch.Tensor":
    """float32 [n, 3, s, s]: shift and zoom by up to `amount`, brightness and colour by up to `amount` of the range.

    What comes in at the border is the colour of the border.
    """
    import torch
    from torch.nn.functional import affine_grid, grid_sample

    if not amount:
        return pixels
    count = len(pixels)
    matrix = torch.zeros(count, 2, 3)
    zoom = 1 + amount * (2 * torch.rand(count, generator=generator) - 1)
    matrix[:, 0, 0] = matrix[:, 1, 1] = zoom
    matrix[:, :, 2] = amount * (2 * torch.rand(count, 2, generator=generator) - 1)
    grid = affine_grid(matrix, list(pixels.shape), align_corners=False)
    moved = grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    # The pixels are in units of a standard deviation, about 0.27 of the range.
    return moved + amount / 0.27 * (torch.rand(count, 3, 1, 1, generator=generator) - 0.5)
