"""What each rank knows of itself, brought together at the logged steps: times, memory, norm gains, and who is slow."""

import socket
import sys
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megacm3.model.layers import HeadNorm
from megacm3.parallel.engine import Engine

SLOW = 1.5
"""A rank is slow when it needs so many times what its peers need,"""
SLOW_SECONDS = 0.1
"""and so much longer: below, it is the noise of small steps."""


@dataclass(frozen=True)
class Figures:
    """All ranks' figures of the last step, and the model's norm gains."""

    forward: list[float]
    """Seconds of each rank's forward passes."""
    wait: list[float]
    """Seconds that each rank waited for its batch."""
    memory: int
    """Most bytes that a rank has held so far: of its GPU, or resident where there is none."""
    gains: dict[str, float]
    """Root mean square and largest magnitude of the q and k norms' weights, where there are any."""


class Ranks:
    """Gathers `Figures`; every rank must call it at the same step."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._context, self.world = engine, engine.context, engine.context.world
        cuda = self._context.device.type == "cuda"
        self.device_name = torch.cuda.get_device_name(self._context.device) if cuda else ""
        self._hosts: list[str] = [""] * engine.context.world
        dist.all_gather_object(self._hosts, socket.gethostname(), group=engine.context.control_group)

    def gather(self, wait: float) -> Figures:
        """wait: seconds that this rank waited for the step's batch. Collective."""
        own = [self._engine.clock.seconds(), wait, float(self._memory()), *self._gains()]
        mine = torch.tensor(own, dtype=torch.float64)
        every = [torch.empty_like(mine) for _ in range(self._context.world)]
        dist.all_gather(every, mine, group=self._context.control_group)
        table = torch.stack(every)
        gains: dict[str, float] = {}
        for column, name in ((3, "q_gain"), (6, "k_gain")):
            squares, count, largest = table[:, column : column + 3].unbind(1)
            if count.sum():
                gains[name] = float((squares.sum() / count.sum()).sqrt())
                gains[f"{name}_max"] = float(largest.max())
        return Figures(table[:, 0].tolist(), table[:, 1].tolist(), int(table[:, 2].max()), gains)

    def slow(self, figures: Figures) -> str:
        """A line that names the rank that holds the others up; "" when there is none."""
        return slow_rank(figures, self._hosts, self._context.tensor * self._context.data)

    def _memory(self) -> int:
        if self._context.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    @torch.no_grad()
    def _gains(self) -> list[float]:
        # Equal copies on tensor and data ranks weigh equally; ZeRO-3 shares add up, their padding is zero.
        found: dict[str, list[Any]] = {"q_norm": [], "k_norm": []}
        for name, module in self._engine.module.named_modules():
            if isinstance(module, HeadNorm):
                found[name.rpartition(".")[2]].append(module.weight)
        out: list[float] = []
        for weights in found.values():
            values = [getattr(weight, "ds_tensor", weight.data).float() for weight in weights]
            if not values:
                out += [0.0, 0.0, 0.0]
                continue
            shared = self._context.data if hasattr(weights[0], "ds_tensor") else 1
            count = sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights) / shared
            squares = torch.stack([value.double().square().sum() for value in values]).sum()
            largest = torch.stack([value.abs().max() for value in values]).max()
            out += [float(squares), count, float(largest)]
        return out


def slow_rank(figures: Figures, hosts: list[str], stage_size: int) -> str:
    """A line that names the rank that holds the others up; "" when there is none.

    Ranks are compared with those of the same pipeline stage (`stage_size` of them): stages differ in what they compute.
    """
    worst, line = 0.0, ""
    for what, seconds in (("forward pass", figures.forward), ("wait for data", figures.wait)):
        for rank, own in enumerate(seconds):
            first = rank // stage_size * stage_size
            peers = [seconds[other] for other in range(first, first + stage_size) if other != rank]
            usual = median(peers) if peers else own
            if own > SLOW * usual and own - usual > max(SLOW_SECONDS, worst):
                worst = own - usual
                line = f"rank {rank} on {hosts[rank]} is slow: {what} {own:.2f} s, its peers {usual:.2f} s"
    return line
