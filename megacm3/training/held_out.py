"""Loss on documents kept out of training, measured while a run trains, without touching the training's numbers."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megacm3.config import Config, total_steps
from megacm3.data.documents import Layout
from megacm3.data.store import Store
from megacm3.data.stream import Stream
from megacm3.errors import ConfigError, DataError
from megacm3.model.loss import IGNORE
from megacm3.parallel.context import ParallelContext
from megacm3.parallel.engine import Engine

log = logging.getLogger(__name__)


class HeldOut:
    """The first `evaluation.documents` of a store, each in a row of its own, in plain order: nothing rearranged, no
    retrieved documents, no dropout. What bears loss is the training's choice (objective.loss_on).
    """

    def __init__(self, config: Config, context: ParallelContext, stream: Stream, store: Store) -> None:
        """Reads this data rank's share. Raises ConfigError for a store that does not belong to the run."""
        _check(store, stream)
        self.every, self._last = config.evaluation.every, total_steps(config)
        self._pixels, self._codes = store.shape.image_size**2, store.shape.image_tokens
        samples = _samples(config, stream, store)
        if not any((targets != IGNORE).any() for _, targets in samples):
            raise ConfigError(
                f"evaluation.store = {store.folder}: its first {len(samples)} documents have no answers, which "
                "objective.loss_on = answers needs; name a store of a fine-tuning set"
            )
        self._batches = _batches(samples, config, context)

    def due(self, step: int) -> bool:
        """Whether it is measured after step `step` (1 = the first)."""
        return step % self.every == 0 or step == self._last

    def measure(self, engine: Engine) -> dict[str, Any]:
        """Losses in nats, perplexities and bits per pixel, as a line of metrics has them. Collective."""
        begun = time.monotonic()
        nll, _, _, count, text, texts, image, images = engine.evaluate(self._batches).tolist()
        found: dict[str, Any] = {"loss": nll / count}
        for name, total, number in (("text", text, texts), ("image", image, images)):
            if number:
                loss = total / number
                found |= {f"loss_{name}": loss, f"perplexity_{name}": math.exp(min(loss, 700.0))}
        if images:
            found["bits_per_pixel"] = found["loss_image"] / math.log(2) * self._codes / self._pixels
        found["seconds"] = time.monotonic() - begun
        return {f"held_out_{name}": value for name, value in found.items()}


def open_held_out(config: Config, context: ParallelContext, stream: Stream) -> HeldOut | None:
    """What the config's evaluation section describes; None where it names no store. Raises ConfigError, DataError."""
    folder = config.evaluation.store
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise DataError(f"evaluation.store = {folder} does not exist; expected a token store")
    return HeldOut(config, context, stream, Store.open(folder))


def _check(store: Store, stream: Stream) -> None:
    for source in stream.sources:
        trained = source.store
        assert isinstance(trained, Store)
        if store.fingerprint == trained.fingerprint:
            raise ConfigError(
                f"evaluation.store = {store.folder} is trained on, as {trained.folder} of data.mixture; "
                "expected a store of other documents"
            )
        for name in ("text_size", "codebook_size", "image_tokens"):
            found, expected = getattr(store.shape, name), getattr(trained.shape, name)
            if found != expected:
                raise ConfigError(
                    f"evaluation.store = {store.folder} has {name} {found}; expected {expected} as in {trained.folder}"
                )
        for role, expected in trained.inputs.items():
            if role in ("text_tokenizer", "image_tokenizer") and store.inputs.get(role) != expected:
                raise ConfigError(
                    f"evaluation.store = {store.folder} was made with {role} {str(store.inputs.get(role))[:12]}; "
                    f"expected {expected[:12]}, that of {trained.folder}"
                )


def _samples(config: Config, stream: Stream, store: Store) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets of each document, the longest first, so that rows of a batch are alike."""
    layout = Layout(stream.vocabulary, stream.settings.turns)
    most, cut, samples = config.model.sequence_length, 0, []
    for doc_id in range(min(config.evaluation.documents, len(store))):
        tokens, answers = layout.assemble([store.document(doc_id)])
        targets = np.where(answers[1:], tokens[1:], IGNORE) if stream.settings.answers_only else tokens[1:]
        cut += len(targets) > most
        samples.append((tokens[:-1][:most], targets[:most]))
    if cut:
        log.warning("%d of %d held-out documents are cut at model.sequence_length = %d", cut, len(samples), most)
    return sorted(samples, key=lambda sample: -len(sample[0]))


def _batches(
    samples: list[tuple[np.ndarray, np.ndarray]], config: Config, context: ParallelContext
) -> list[dict[str, torch.Tensor]]:
    """This data rank's micro-batches, as many on every rank; rows without loss fill up the last."""
    size, unit = config.train.micro_batch, config.parallel.tensor if config.parallel.sequence else 1
    own, longest = size * context.data, len(samples[0][0])
    batches = []
    for first in range(0, len(samples), own):
        # A pipeline hands on tensors of one shape.
        length = longest if context.pipeline > 1 else len(samples[first][0])
        length = -(-length // unit) * unit
        tokens = torch.zeros((size, length), dtype=torch.int64)
        targets = torch.full((size, length), IGNORE, dtype=torch.int64)
        documents = torch.full((size, length), -1, dtype=torch.int32)
        mine = samples[first + context.data_rank * size : first + (context.data_rank + 1) * size]
        for row, (inputs, wanted) in enumerate(mine):
            tokens[row, : len(inputs)] = torch.from_numpy(inputs)
            targets[row, : len(wanted)] = torch.from_numpy(wanted)
            documents[row, : len(inputs)] = 0
        numbers = torch.zeros(size, dtype=torch.int64)
        batches.append({"tokens": tokens, "targets": targets, "documents": documents, "numbers": numbers})
    return batches
