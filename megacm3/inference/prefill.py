"""Prompts into the cache: equal prompts run once, and a long common beginning (retrieved documents) runs once.

Shape letters as in decoder.py.
"""

from collections.abc import Sequence

import torch

from megacm3.inference.decoder import Cache, Decoder

SHARE_FROM = 16
"""A common beginning shorter than this costs more to copy than to run twice."""
BATCH_TOKENS = 8192
"""Most tokens (with padding) of one pass: bounds the memory of the activations."""

Ids = tuple[int, ...]


@torch.inference_mode()
def prefill(decoder: Decoder, prompts: Sequence[Sequence[int]], cache: Cache, first_row: int = 0) -> torch.Tensor:
    """Run `prompts` (each of at least one token) into rows `first_row`, `first_row + 1`, ... of `cache`.

    Returns hidden [prompts, H] of each prompt's last token.
    """
    wanted = [tuple(prompt) for prompt in prompts]
    unique = sorted(set(wanted))
    slots = max(map(len, unique))
    scratch = decoder.cache(len(unique), slots)
    starts = [0] * len(unique)
    for first, last, depth, length in _shared(unique, 0, len(unique), 0):
        # The run's common beginning goes through once, in its first row, and is copied to the others.
        decoder.forward(_tokens([unique[first][depth:length]], decoder), [depth], scratch, first)
        for row in range(first, last):
            starts[row] = length
            if row > first:
                scratch.copy_row(scratch, first, row, length)
    hidden = _run_rest(decoder, unique, starts, scratch)
    place = {prompt: row for row, prompt in enumerate(unique)}
    for row, prompt in enumerate(wanted):
        cache.copy_row(scratch, place[prompt], first_row + row, len(prompt))
    return hidden[[place[prompt] for prompt in wanted]]


def _shared(prompts: Sequence[Ids], first: int, last: int, depth: int) -> list[tuple[int, int, int, int]]:
    """(first, last + 1, from, to): runs of the sorted `prompts` whose tokens [from, to) are alike, outer runs first.

    At least one token of every prompt stays, since its hidden state is the result.
    """
    steps = []
    while first < last:
        stop, length = first + 1, len(prompts[first])
        while stop < last:
            a, b = prompts[stop - 1], prompts[stop]
            common = min(_common(a, b), len(a) - 1, len(b) - 1)
            if common < depth + SHARE_FROM:
                break
            stop, length = stop + 1, min(length, common)
        if stop - first > 1:
            steps += [(first, stop, depth, length), *_shared(prompts, first, stop, length)]
        first = stop
    return steps


def _common(a: Ids, b: Ids) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _run_rest(decoder: Decoder, prompts: Sequence[Ids], starts: Sequence[int], scratch: Cache) -> torch.Tensor:
    rests = [prompt[start:] for prompt, start in zip(prompts, starts, strict=True)]
    hidden = torch.empty((len(prompts), decoder.architecture.hidden_size), device=decoder.device, dtype=decoder.dtype)
    first = 0
    while first < len(rests):
        last = first + 1
        while last < len(rests) and _worth_joining(rests[first : last + 1]):
            last += 1
        batch = rests[first:last]
        counts = [len(rest) for rest in batch]
        out = decoder.forward(_tokens(batch, decoder), starts[first:last], scratch, first, counts)
        hidden[first:last] = out[torch.arange(len(batch)), torch.tensor(counts) - 1]
        first = last
    return hidden


def _worth_joining(rests: Sequence[Ids]) -> bool:
    longest = max(map(len, rests))
    padded = longest * len(rests)
    return padded <= BATCH_TOKENS and (longest <= 64 or padded <= 2 * sum(map(len, rests)))


def _tokens(rows: Sequence[Ids], decoder: Decoder) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + (0,) * (width - len(row)) for row in rows], device=decoder.device)
