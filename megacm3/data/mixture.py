"""Which document is sample number g: several stores with weights, in stages, each store permuted anew in every epoch.

Within a period of 2^16 samples every store has a fixed number of places, in a keyed random order; the whole of
`lookup` is arithmetic on g and these two small tables, so that any sample is found without those before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megacm3.command import seed_from
from megacm3.data.packing import Permutation
from megacm3.errors import ConfigError

PERIOD = 1 << 16
"""Samples after which the order of stores repeats; weights are kept to 1/PERIOD."""


def apportion(weights: Sequence[float], seats: int) -> list[int]:
    """`seats` whole places shared out by `weights`, by largest remainders; a positive weight gets at least one place.

    Raises ConfigError when no weight is positive or one is negative or not finite.
    """
    exact = np.asarray(weights, np.float64)
    if len(exact) == 0 or not np.isfinite(exact).all() or exact.min() < 0 or exact.sum() <= 0:
        raise ConfigError(f"data.mixture weights {list(weights)}; expected numbers from 0 up, at least one above 0")
    exact = exact / exact.sum() * seats
    places = np.maximum(np.floor(exact).astype(np.int64), exact > 0)
    # Where minimum places made too many, the largest entries give them back.
    while places.sum() > seats:
        places[np.argmax(places)] -= 1
    order = np.argsort(-(exact - np.floor(exact)), kind="stable")
    for i in order[: int(seats - places.sum())]:
        places[i] += 1
    return places.tolist()


def capped_weights(weights: Sequence[float], sizes: Sequence[int], up: float = 0.0, down: float = 0.0) -> list[float]:
    """Shares by `weights`, each kept within [down, up] times the store's part of all documents (0 = no bound).

    What one store may not give, or must, is shared out by the weights of the others, so that the bounds hold for what
    is drawn. CM3Leon's fine-tuning: up 3, down 0.3 (paper, E.1). A weight of 0 stays 0.
    Raises ConfigError for bounds that no shares keep: up below 1 or down above 1.
    """
    if (up and up < 1) or down > 1 or down < 0:
        raise ConfigError(f"data.upsample = {up}, data.downsample = {down}; expected at least 1, and from 0 to 1")
    given = np.asarray(weights, np.float64)
    used = given > 0
    if not used.any() or not (up or down):
        return given.tolist()
    natural = np.where(used, sizes, 0) / max(1, int(np.sum(np.asarray(sizes)[used])))
    low, high = down * natural, np.where(used, up * natural if up else 1.0, 0.0)
    least, most = 0.0, float((np.maximum(high, 1.0)[used] / given[used]).max())
    for _ in range(200):
        scale = (least + most) / 2
        below = np.clip(scale * given, low, high).sum() < 1
        least, most = (scale, most) if below else (least, scale)
    return np.clip(most * given, low, high).tolist()


def balanced_weights(weights: Sequence[float], pictures: Sequence[float], target: float) -> list[float]:
    """Weights scaled so that `target` of the answers drawn hold a picture (Chameleon's balance of modalities).

    pictures: each store's part of documents whose answer has one. Between the stores of one kind the weights' ratios
    stay. Raises ConfigError when the stores cannot give that share.
    """
    w, p = np.asarray(weights, np.float64), np.asarray(pictures, np.float64)
    # Stores are scaled by a p + b (1 - p); the share is a ratio of sums that are linear in a and b.
    both, mixed, none = float(w @ p**2), float(w @ (p * (1 - p))), float(w @ (1 - p) ** 2)
    a, b = target * (mixed + none) - mixed, both - target * (both + mixed)
    scaled = w * (a * p + b * (1 - p))
    if a < 0 or b < 0 or scaled.sum() <= 0:
        low, high = float(p[w > 0].min()), float(p[w > 0].max())
        raise ConfigError(
            f"data.image_answers = {target}: the stores' shares of answers with a picture are {low:.2f} to {high:.2f}; "
            "expected a share between them, or stores of the other kind in data.mixture"
        )
    return scaled.tolist()


def limit_epochs(weights: Sequence[float], sizes: Sequence[int], epochs: Sequence[float], draws: int) -> list[float]:
    """Weights lowered so that no store is passed over more than its `epochs` times in `draws` samples (0 = no limit).

    What one store may not give, the others give in proportion. Raises ConfigError when all are at their limits and
    there are still too few documents.
    """
    shares = np.asarray(weights, np.float64)
    shares = shares / shares.sum()
    limits = np.array([e * n / draws if e else np.inf for e, n in zip(epochs, sizes, strict=True)])
    limits[shares == 0] = 0
    if limits.sum() < 1:
        most = int(sum(e * n for e, n, w in zip(epochs, sizes, weights, strict=True) if w > 0))
        raise ConfigError(
            f"training draws {draws} documents, but the epochs of data.mixture allow {most}; "
            "raise data.mixture[*].epochs, add stores, or train for fewer steps"
        )
    fixed = np.zeros(len(shares), bool)
    while True:
        over = (shares > limits) & ~fixed
        if not over.any():
            return shares.tolist()
        fixed |= over
        shares[fixed] = limits[fixed]
        rest = ~fixed & (shares > 0)
        shares[rest] *= (1 - shares[fixed].sum()) / shares[rest].sum()


@dataclass(frozen=True)
class Stage:
    """A stretch of the stream with fixed weights."""

    first: int
    """Number of its first sample."""
    weights: tuple[float, ...]
    """Of each store."""


class Mixture:
    """Sample number -> (store, document, epoch)."""

    def __init__(self, sizes: Sequence[int], stages: Sequence[Stage], seed: int) -> None:
        """sizes: documents of each store. stages: in order, the first from sample 0; the last one never ends.

        Raises ConfigError for wrong weights, or a weight on an empty store.
        """
        self.sizes, self.stages, self.seed = tuple(sizes), tuple(stages), seed
        self._orders: list[np.ndarray] = []
        self._ranks: list[np.ndarray] = []
        self._bases: list[np.ndarray] = []
        base = np.zeros(len(self.sizes), np.int64)
        for i, stage in enumerate(self.stages):
            self._add_stage(i, stage)
            self._bases.append(base)
            if i + 1 < len(self.stages):
                base = base + self._drawn(i, self.stages[i + 1].first - stage.first)
        self._permutation = lru_cache(maxsize=64)(self._make_permutation)

    def _add_stage(self, number: int, stage: Stage) -> None:
        for i, (size, weight) in enumerate(zip(self.sizes, stage.weights, strict=True)):
            if size == 0 and weight > 0:
                raise ConfigError(f"data.mixture[{i}] has weight {weight} but no documents")
        places = apportion(stage.weights, PERIOD)
        order = np.repeat(np.arange(len(places), dtype=np.int16), places)
        np.random.Generator(np.random.PCG64(seed_from("mixture", self.seed, number))).shuffle(order)
        rank = np.zeros(PERIOD, np.int64)
        for i in range(len(places)):
            rank[order == i] = np.arange(places[i])
        self._orders.append(order)
        self._ranks.append(rank)

    def _drawn(self, stage: int, count: int) -> np.ndarray:
        # Documents of each store among the first `count` samples of a stage.
        stores, order = len(self.sizes), self._orders[stage]
        whole = np.bincount(order, minlength=stores) * (count // PERIOD)
        return whole + np.bincount(order[: count % PERIOD], minlength=stores)

    def _make_permutation(self, store: int, epoch: int) -> Permutation:
        return Permutation(self.sizes[store], "epoch", self.seed, store, epoch)

    def stage_of(self, number: int) -> int:
        """Index of the stage that sample `number` belongs to."""
        return max(i for i, stage in enumerate(self.stages) if stage.first <= number)

    def lookup(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Stores, documents and epochs, int64 [count] each, of `count` samples from `first` on, all of one stage."""
        stage = self.stage_of(first)
        numbers = np.arange(first, first + count) - self.stages[stage].first
        slots, rounds = numbers % PERIOD, numbers // PERIOD
        stores = self._orders[stage][slots].astype(np.int64)
        per_period = np.bincount(self._orders[stage], minlength=len(self.sizes))
        positions = self._bases[stage][stores] + rounds * per_period[stores] + self._ranks[stage][slots]
        sizes = np.asarray(self.sizes)[stores]
        epochs, places = positions // sizes, positions % sizes
        documents = np.empty(count, np.int64)
        for store, epoch in {(int(s), int(e)) for s, e in zip(stores, epochs, strict=True)}:
            chosen = (stores == store) & (epochs == epoch)
            documents[chosen] = self._permutation(store, epoch)(places[chosen])
        return stores, documents, epochs

    def passes(self, number: int) -> list[float]:
        """Passes over each store before sample `number`."""
        stage = self.stage_of(number)
        drawn = self._bases[stage] + self._drawn(stage, number - self.stages[stage].first)
        return [float(count / size) if size else 0.0 for count, size in zip(drawn, self.sizes, strict=True)]
