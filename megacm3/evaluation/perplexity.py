"""Loss per text and image token over a store, in the plain order `</s> T <break> I </s>`, nothing rearranged.

Answers of fine-tuning stand behind `<end-of-turn>` where the model was trained so.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from megacm3.data.documents import Document, Layout
from megacm3.data.store import Store
from megacm3.errors import DataError
from megacm3.files import read_manifest
from megacm3.tokenizers.vocabulary import IMAGE, TEXT

if TYPE_CHECKING:
    from megacm3.inference.api import Generator

BATCH_TOKENS = 4096
"""Tokens (with padding) of one pass."""
PARTS = 8
"""Of the context, for losses by position."""
LOGIT_ROWS = 1024
"""Positions whose logits are held at once."""


def check_store(generator: "Generator", store: Store) -> None:
    """Raises DataError when the store was made with tokenizers other than the model folder's."""
    for name, found in store.inputs.items():
        folder = generator.folder / name
        if not folder.is_dir():
            continue
        expected = read_manifest(folder, name).fingerprint
        if found != expected:
            raise DataError(
                f"{store.folder} was made with {name} {found[:12]}, the model with {expected[:12]}; "
                "expected a store of the model's own tokenizers: see --input"
            )
    vocabulary = generator.vocabulary
    for key in ("text_size", "codebook_size", "image_tokens"):
        if store.settings[key] != getattr(vocabulary, key) and vocabulary.family == "cm3leon":
            raise DataError(f"{store.folder} has {key} {store.settings[key]}; the model has {getattr(vocabulary, key)}")


def perplexity(generator: "Generator", documents: Iterable[Document]) -> dict[str, Any]:
    """Mean loss in nats and its exponential by modality and position, and bits per pixel of pictures.

    by_position: mean loss in each eighth of the context, None where no token stands. A document longer than the context
    is cut there, and counted. By number of retrieved documents: `retrieval_gain`.
    """
    layout = Layout(generator.vocabulary, generator.turns)
    kind = torch.from_numpy(generator.vocabulary.kind)
    sums = {name: torch.zeros(PARTS, dtype=torch.float64) for name in (TEXT, IMAGE)}
    counts = {name: torch.zeros(PARTS, dtype=torch.float64) for name in (TEXT, IMAGE)}
    read = cut = 0

    def samples() -> Iterator[np.ndarray]:
        nonlocal read, cut
        for document in documents:
            tokens, _ = layout.assemble([document])
            read += 1
            cut += len(tokens) > generator.context
            yield tokens[: generator.context]

    for batch in batches_of(samples()):
        losses, targets = token_losses(generator, batch)
        part = torch.cat([torch.arange(1, len(tokens)) for tokens in batch]) * PARTS // (generator.context + 1)
        for name in (TEXT, IMAGE):
            chosen = kind[targets] == name
            sums[name].index_add_(0, part[chosen], losses[chosen])
            counts[name].index_add_(0, part[chosen], torch.ones_like(losses[chosen]))
    result: dict[str, Any] = {"documents": read, "documents_cut": cut}
    for name, label in ((TEXT, "text"), (IMAGE, "image")):
        if counts[name].sum():
            mean = float(sums[name].sum() / counts[name].sum())
            result[label] = {"loss": mean, "perplexity": math.exp(mean), "tokens": int(counts[name].sum())}
            parts = zip((sums[name] / counts[name]).tolist(), counts[name].tolist(), strict=True)
            result[label]["by_position"] = [value if number else None for value, number in parts]
    if "image" in result:
        bits = result["image"]["loss"] / math.log(2) * generator.vocabulary.image_tokens
        result["image"]["bits_per_pixel"] = bits / generator.image_size**2
    return result


def batches_of(samples: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    batch: list[np.ndarray] = []
    for sample in samples:
        longest = max(len(sample), *(len(other) for other in batch)) if batch else len(sample)
        if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


@torch.inference_mode()
def token_losses(generator: "Generator", batch: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and id of every target, [tokens] each."""
    decoder = generator.decoder
    counts = [len(tokens) - 1 for tokens in batch]
    inputs = torch.zeros((len(batch), max(counts)), dtype=torch.int64)
    for row, tokens in enumerate(batch):
        inputs[row, : counts[row]] = torch.from_numpy(tokens[:-1])
    cache = decoder.cache(len(batch), max(counts))
    hidden = decoder.forward(inputs.to(decoder.device), [0] * len(batch), cache, 0, counts)
    rows = torch.cat([hidden[row, :count] for row, count in enumerate(counts)])
    targets = torch.from_numpy(np.concatenate([tokens[1:] for tokens in batch]))
    losses = []
    for start in range(0, len(rows), LOGIT_ROWS):
        logits = decoder.logits(rows[start : start + LOGIT_ROWS])[:, : generator.vocabulary.size]
        wanted = targets[start : start + LOGIT_ROWS].to(decoder.device)
        losses.append(F.cross_entropy(logits, wanted, reduction="none").double().cpu())
    return torch.cat(losses), targets
