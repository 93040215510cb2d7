"""Which weights ZeRO-3 gathers more than once in a micro-batch, and how many it holds whole at a time. Pure functions.

DeepSpeed follows the order in which a micro-batch uses its modules: it gathers ahead of use until so many numbers are
whole (stage3_max_live_parameters), and keeps what comes again within some distance (stage3_max_reuse_distance). Here
that order is walked through in the same way (its partitioned_param_coordinator.py); tests/dist/test_estimate.py counts
on ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Gathering:
    """What one micro-batch makes of the weights' shares."""

    numbers: int
    """Gathered, forward and backward pass together."""
    peak: int
    """Most that are whole at once."""


def micro_batch_order(first: Sequence[str], blocks: Sequence[Sequence[str]], last: str, again: bool) -> tuple[str, ...]:
    """The modules with weights as a micro-batch comes to them; `again` where blocks run a second time."""
    forward = [*first, *(name for block in blocks for name in block), last]
    backward = [last]
    for block in reversed(blocks):
        backward += [*(block if again else ()), *reversed(block)]
    return (*forward, *backward, *reversed(first))


@lru_cache(maxsize=256)
def gathering(
    order: tuple[str, ...], sizes: tuple[tuple[str, int], ...], reach: int, ahead: int, live: int
) -> Gathering:
    """Walk through a micro-batch.

    order: modules by use. sizes: numbers of each. reach: distance within which one is kept. ahead: numbers to gather in
    advance at each step, while fewer than `live` are whole.
    """
    count = dict(sizes)
    whole: set[str] = set()
    seen: dict[str, int] = {}
    held = total = peak = queued = 0
    for step, name in enumerate(order):
        wanted = [name] if name not in whole else []
        queued, found = max(queued, step + 1), 0
        budget = min(live - held - sum(count[item] for item in wanted), ahead)
        while queued < len(order) and found < budget:
            seen[order[queued]] = queued
            if order[queued] not in whole and order[queued] not in wanted:
                wanted.append(order[queued])
                found += count[order[queued]]
            queued += 1
        whole |= set(wanted)
        held += sum(count[item] for item in wanted)
        total += sum(count[item] for item in wanted)
        peak = max(peak, held)
        if seen.get(name, -1) <= step and not _returns(order, step, count, reach):
            whole.remove(name)
            held -= count[name]
    return Gathering(total, peak)


def _returns(order: tuple[str, ...], step: int, count: dict[str, int], reach: int) -> bool:
    # Whether the module of a step is used again before `reach` numbers have gone by.
    passed = 0
    for name in order[step + 1 :]:
        if passed >= reach:
            return False
        if name == order[step]:
            return True
        passed += count[name]
    return False
