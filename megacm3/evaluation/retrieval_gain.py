"""Does retrieval help? Loss per image token of held-out pictures with no, retrieved and random documents in front.

The documents come from the training store, by the neighbours of the held-out store in the training bank: never a copy
of what is asked about (found by hashes, captions and vectors), never above the score that training allows. Each picture
is measured under every condition by every model, so that differences are of pairs; models are seeds of one recipe.
Losses are over the codes of the held-out picture alone, given its caption and what stands in front.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megacm3.command import progress, seed_from
from megacm3.data.documents import Layout
from megacm3.data.store import Store
from megacm3.errors import ConfigError, DataError
from megacm3.evaluation.page import Section
from megacm3.evaluation.perplexity import check_store, token_losses
from megacm3.retrieval.bank import MemoryBank
from megacm3.retrieval.neighbours import TEXT, NeighbourTable
from megacm3.retrieval.sampler import RetrievalSampler

if TYPE_CHECKING:
    from megacm3.inference.api import Generator

WAYS = ("sampled as in training", "by the caption alone", "random")
MOST = 3
_NONE = "none"
_BATCH = 16


@dataclass(frozen=True)
class HeldOut:
    """What is asked about and what may stand in front."""

    store: Store
    candidates: Store
    """The training store."""
    table: NeighbourTable
    """Neighbours of `store` in the bank of `candidates`."""
    max_score: float = 0.9
    seed: int = 0

    def check(self) -> None:
        """Raises DataError when the three do not belong together."""
        expected = {"store": self.store.fingerprint, "candidates": self.candidates.fingerprint}
        for name, fingerprint in expected.items():
            found = self.table.inputs.get(name, "")
            if found != fingerprint:
                raise DataError(
                    f"{self.table.folder} has {name} {found[:12] or 'none'}; expected {fingerprint[:12]}: make it with "
                    "tools/find_neighbours.py --bank TRAINING_BANK --queries HELD_OUT_BANK"
                )

    def in_front(self, doc_id: int) -> dict[tuple[str, int], list[int]]:
        """Documents by (way, number of them), for those ways that have as many; (none, 0) is always there."""
        found: dict[tuple[str, int], list[int]] = {(_NONE, 0): []}
        for count in range(1, MOST + 1):
            for way in WAYS:
                drawn = self._draw(doc_id, way, count)
                if len(drawn) == count:
                    found[way, count] = drawn
        return found

    def _draw(self, doc_id: int, way: str, count: int) -> list[int]:
        if way == WAYS[1]:
            ids, scores = self.table.candidates(doc_id, TEXT)
            fit = (ids >= 0) & (scores <= self.max_score)
            fit &= ~self.table.metadata.held_out[self.table.metadata.rows(ids)]
            return ids[fit][:count].tolist()
        weights = [float(n == count) for n in range(MOST + 1)]
        mode = "random" if way == WAYS[2] else "neighbours"
        sampler = RetrievalSampler(self.table, weights, self.max_score, mode)
        return sampler.sample(doc_id, np.random.default_rng(seed_from(self.seed, "gain", way, count, doc_id)))


def gain(
    models: Sequence["Generator"], held_out: HeldOut, baseline: Sequence["Generator"] = (), limit: int | None = None
) -> dict[str, Any]:
    """The figures, as JSON. `baseline`: models of the same recipe trained without retrieval.

    Raises DataError for stores of other tokenizers than the models', ConfigError when nothing can be measured.
    """
    held_out.check()
    for generator in (*models, *baseline):
        check_store(generator, held_out.store)
    context = min(generator.context for generator in (*models, *baseline))
    samples, left_out = _samples(held_out, models[0], context, limit)
    if not samples:
        raise ConfigError(
            f"no document of {held_out.store.folder} has {MOST} neighbours that fit into {context} tokens"
        )
    conditions = list(samples[0])
    losses = np.stack([_losses(generator, samples, conditions) for generator in models])
    result = _figures(losses, conditions) | {
        "documents": len(samples),
        "left_out": left_out,
        "image_tokens": len(samples) * models[0].vocabulary.image_tokens,
        "models": len(models),
    }
    if baseline:
        plain = np.stack([_losses(generator, samples, [(_NONE, 0)]) for generator in baseline])[:, 0]
        result["baseline"] = _row(plain, losses[:, conditions.index((_NONE, 0))])
    return result


Samples = list[dict[tuple[str, int], np.ndarray]]


def _samples(held_out: HeldOut, generator: "Generator", context: int, limit: int | None) -> tuple[Samples, int]:
    # Only documents for which every condition can be made and fits: the same ones under each.
    layout, samples, left_out = Layout(generator.vocabulary, generator.turns), [], 0
    count = len(held_out.store) if limit is None else min(limit, len(held_out.store))
    wanted = 1 + len(WAYS) * MOST
    for doc_id in range(count):
        own = held_out.store.document(doc_id)
        made = {
            condition: layout.assemble([*(held_out.candidates.document(n) for n in front), own])[0]
            for condition, front in held_out.in_front(doc_id).items()
        }
        if len(made) < wanted or max(map(len, made.values())) > context:
            left_out += 1
            continue
        samples.append(made)
    return samples, left_out


def _losses(generator: "Generator", samples: Samples, conditions: Sequence[tuple[str, int]]) -> np.ndarray:
    """float64 [conditions, samples]: mean loss of the last picture's codes."""
    codes = generator.vocabulary.image_tokens
    found = np.zeros((len(conditions), len(samples)))
    for row, condition in enumerate(progress(list(conditions), unit="condition", description="loss")):
        for start in range(0, len(samples), _BATCH):
            batch = [sample[condition] for sample in samples[start : start + _BATCH]]
            losses, targets = token_losses(generator, batch)
            pictures = generator.vocabulary.is_image(targets.numpy())
            ends = np.cumsum([len(tokens) - 1 for tokens in batch])
            for n, (first, last) in enumerate(zip(np.concatenate([[0], ends[:-1]]), ends, strict=True)):
                places = first + np.flatnonzero(pictures[first:last])[-codes:]
                found[row, start + n] = float(losses[places].mean())
    return found


def _figures(losses: np.ndarray, conditions: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """losses: float64 [models, conditions, samples]."""
    none = losses[:, conditions.index((_NONE, 0))]
    rows = []
    for number, (way, count) in enumerate(conditions):
        row = {"documents": count, "way": way} | _row(losses[:, number], none)
        if way in WAYS[:2]:
            random = losses[:, conditions.index((WAYS[2], count))]
            row["gain_over_random"] = _difference(random, losses[:, number])
        rows.append(row)
    return {"rows": rows}


def _row(losses: np.ndarray, none: np.ndarray) -> dict[str, Any]:
    means = losses.mean(1)
    spread = float(means.std(ddof=1)) if len(means) > 1 else None
    return {
        "loss": float(means.mean()),
        "loss_by_model": means.tolist(),
        "spread": spread,
        "gain": _difference(none, losses),
    }


def _difference(other: np.ndarray, losses: np.ndarray) -> dict[str, float]:
    """Mean of other - losses over models and samples, and its standard error: those of the samples' means over models
    and of the models' means over samples, added in squares. Models of two recipes are paired by place."""
    count = min(len(other), len(losses))
    pairs = other[:count] - losses[:count]
    error = pairs.mean(0).var(ddof=1) / pairs.shape[1] if pairs.shape[1] > 1 else math.inf
    if count > 1:
        error += pairs.mean(1).var(ddof=1) / count
    return {"mean": float(pairs.mean()), "error": float(math.sqrt(error))}


def verdict(difference: dict[str, float]) -> str:
    """What a difference of losses says: a gain, a loss, or nothing, at two standard errors."""
    mean, error = difference["mean"], difference["error"]
    if abs(mean) <= 2 * error:
        return "no difference"
    return "better" if mean > 0 else "worse"


def latency(bank: MemoryBank, captions: Sequence[str], k: int = 2) -> dict[str, dict[str, float]]:
    """Milliseconds of one prompt at a time: encoding the caption, searching `k` documents, and both; p50 and p99."""
    encoder = bank.encoder()
    bank.search(encoder.encode_texts(captions[:1]), k)
    waits: dict[str, list[float]] = {"encode": [], "search": [], "both": []}
    for caption in captions:
        began = time.perf_counter()
        query = encoder.encode_texts([caption])
        encoded = time.perf_counter()
        bank.search(query, k)
        ended = time.perf_counter()
        for name, seconds in (("encode", encoded - began), ("search", ended - encoded), ("both", ended - began)):
            waits[name].append(1e3 * seconds)
    return {name: {f"p{p}": float(np.percentile(found, p)) for p in (50, 99)} for name, found in waits.items()}


def words(result: dict[str, Any]) -> list[str]:
    """The findings in sentences, a null result as plain as a gain."""
    rows = {(row["way"], row["documents"]): row for row in result["rows"]}
    lines = []
    for way in WAYS[:2]:
        row = rows[way, MOST]
        over_none, over_random = row["gain"], row["gain_over_random"]
        lines.append(
            f"{MOST} documents {way}: {verdict(over_none)} than none ({over_none['mean']:+.4f} +- "
            f"{over_none['error']:.4f} nats a token), {verdict(over_random)} than {MOST} random ones "
            f"({over_random['mean']:+.4f} +- {over_random['error']:.4f})"
        )
    if "baseline" in result:
        plain = result["baseline"]["gain"]
        lines.append(
            f"a model trained without retrieval, against this one without documents: {verdict(plain)} "
            f"({plain['mean']:+.4f} +- {plain['error']:.4f})"
        )
    return [line.replace("no difference than", "no different from") for line in lines]


def table(result: dict[str, Any]) -> list[list[str]]:
    """Heads and rows."""
    seeds = f"spread over {result['models']} seeds" if result["models"] > 1 else "spread"
    heads = ["documents", "which", "loss per image token", seeds, "gain over none", "gain over random"]
    rows = [_cells(str(row["documents"]), row["way"], row) for row in result["rows"]]
    if "baseline" in result:
        rows.append(_cells("0", "none, trained without retrieval", result["baseline"]))
    return [heads, *rows]


def section(result: dict[str, Any]) -> Section:
    """The table of a report."""
    codes = f"{result['documents']} held-out pictures ({result['image_tokens']} codes)"
    text = (
        f"{codes}, each measured under every condition by each of {result['models']} models (seeds); copies of "
        "a picture, by hash, caption or vector, never stand in front of it. "
        f"{result['left_out']} more did not fit or have too few neighbours. Gains in nats a token with the standard "
        "error of their mean; within two of them there is no difference. "
    )
    text += f"{'. '.join(words(result))}."
    if "latency_ms" in result:
        waits = result["latency_ms"]["both"]
        text += f" Caption to documents at inference: p50 {waits['p50']:.1f} ms, p99 {waits['p99']:.1f} ms."
    heads, *rows = table(result)
    return Section("Does retrieval help?", text, table=(heads, rows))


def _cells(count: str, way: str, row: dict[str, Any]) -> list[str]:
    spread = "one seed" if row["spread"] is None else f"{row['spread']:.4f}"
    gains = []
    for name in ("gain", "gain_over_random"):
        found = row.get(name)
        shown = found is not None and not (count == "0" and way == _NONE)
        gains.append(f"{found['mean']:+.4f} +- {found['error']:.4f} ({verdict(found)})" if shown and found else "")
    return [count, way, f"{row['loss']:.4f}", spread, *gains]
