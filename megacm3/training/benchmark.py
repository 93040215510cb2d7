"""This trainer beside a plain loop over transformers' class and a bare loop over megatron-core's layers.

Each program lives in a process of its own, with all cores; a round runs one step of each, one after another, in an
order that turns from round to round. What is compared are medians over the rounds, so that noise hits all alike.
"""

import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from megacm3.config import Config
from megacm3.errors import ConfigError
from megacm3.planning.counts import sequence_flops
from megacm3.resolve import load_config

SHAPE = [
    "model.family=modern",
    "model.layers=8",
    "model.hidden_size=512",
    "model.heads=8",
    "model.kv_heads=8",
    "model.ffn_size=1408",
    "model.vocab_size=65536",
    "model.sequence_length=1024",
    "model.norm=rmsnorm",
    "model.activation=swiglu",
    "model.positions=rope",
    "model.tied=false",
    "model.init=normal",
    "model.init_std=0.02",
    "model.init_residual=scaled",
    "objective.kind=causal",
    "train.dtype=fp32",
    "train.device=cpu",
    "train.steps=1",
    "train.micro_batch=1",
    "train.global_batch=4",
    "deepspeed=ds_configs/zero0.json",
]
"""A trunk of 25.7M parameters under a vocabulary of 65,536; a shape that all three programs can hold."""

WARM_UP = 2
"""Steps before the first round; the optimizer's states exist after the first, and memory is taken over the second."""

_MATRIX = 2048


@dataclass
class Result:
    """What one program gave."""

    name: str
    parameters: int
    losses: list[float]
    """Of the steps before the first round."""
    peak_bytes: int
    """Most bytes of tensors at once, by torch's allocator, over a step."""
    seconds: list[float] = field(default_factory=list)
    """Of the step of each round."""
    matmul: list[float] = field(default_factory=list)
    """FLOP/s of a matrix product in the same process, just before each step."""
    process_bytes: int = 0
    """Most memory of the whole process, libraries included."""

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and AdamW's two moments in fp32."""
        return 16 * self.parameters

    @property
    def above_states(self) -> int:
        """Peak bytes that are neither weights nor gradients nor optimizer states."""
        return self.peak_bytes - self.state_bytes


def step_flops(config: Config) -> int:
    """Model FLOPs of one step, forward and backward."""
    return config.train.global_batch * sequence_flops(config.model)


def _peak_of_tensors(prof: Any, begun: int) -> int:
    """Most live bytes after the time `begun` (ns): the running sum of what torch's CPU allocator took and gave back."""
    live, most = 0, 0
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        if event.start_ns() >= begun:
            most = max(most, live)
    return most


def _matmul_rate() -> float:
    import torch

    a, b = torch.randn(2, _MATRIX, _MATRIX)
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - begun)
    return 2 * _MATRIX**3 / best


def _serve(pipe: Connection, name: str, overrides: list[str], threads: int) -> None:
    """The life of one program's process: build, warm up, then a step for each number received; 0 ends it."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")  # both libraries tell at length what is not installed
    logging.disable(logging.WARNING)
    import torch
    from torch.profiler import ProfilerActivity, profile

    from megacm3.training.contestants import CONTESTANTS, random_step

    torch.set_num_threads(threads)
    config = load_config(None, overrides)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        contestant = CONTESTANTS[name](config)
        losses = []
        for number in range(WARM_UP):
            last_step = time.time_ns()
            losses.append(contestant.step(random_step(config, number)))
    parameters = sum(p.numel() for p in contestant.parameters)
    pipe.send(Result(name, parameters, losses, _peak_of_tensors(prof, last_step)))
    del prof
    while number := pipe.recv():
        rate, batches = _matmul_rate(), random_step(config, WARM_UP + number)
        begun = time.perf_counter()
        contestant.step(batches)
        pipe.send((time.perf_counter() - begun, rate))
    if name == "megacm3" and (shares := pipe.recv()):
        pipe.send(_profiled(contestant.step, random_step(config, 0), shares))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _profiled(step: Callable[[Any], float], batches: Any, top: int) -> tuple[float, list[tuple[str, int, float]]]:
    """(seconds of the step, its `top` operations by time of their own: name, calls, seconds)."""
    from torch.profiler import ProfilerActivity, profile

    begun = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        step(batches)
    seconds = time.perf_counter() - begun
    rows = sorted(prof.key_averages(), key=lambda row: -row.self_cpu_time_total)[:top]
    return seconds, [(row.key, row.count, row.self_cpu_time_total / 1e6) for row in rows]


@dataclass
class Comparison:
    """All programs, and where the time of this trainer's step goes."""

    config: Config
    results: dict[str, Result]
    profile: tuple[float, list[tuple[str, int, float]]] | None = None

    def ratio(self, name: str, other: str) -> float:
        """Median over the rounds of the speed of one program over another's."""
        mine, theirs = self.results[name].seconds, self.results[other].seconds
        return statistics.median(b / a for a, b in zip(mine, theirs, strict=True))

    def tokens_per_second(self, name: str) -> float:
        """Of the median step."""
        tokens = self.config.train.global_batch * self.config.model.sequence_length
        return tokens / statistics.median(self.results[name].seconds)

    def utilisation(self, name: str) -> float:
        """Model FLOP/s over the FLOP/s of a matrix product of the same process; median over the rounds."""
        result, flops = self.results[name], step_flops(self.config)
        return statistics.median(flops / s / peak for s, peak in zip(result.seconds, result.matmul, strict=True))


def benchmark_train(
    rounds: int, overrides: list[str], told: Callable[[str], None] = lambda line: None, top: int = 0
) -> Comparison:
    """Run all programs for `rounds` rounds. top: operations of this trainer's step to list, 0 = none.

    Raises ConfigError for a shape that not all can hold, or when their losses differ: then they are not the same work.
    """
    from megacm3.training.contestants import CONTESTANTS

    if rounds < 1:
        raise ConfigError(f"--rounds {rounds}; expected at least 1")
    given = [*SHAPE, *overrides]
    config = load_config(None, given)
    context, names = multiprocessing.get_context("spawn"), list(CONTESTANTS)
    threads = len(os.sched_getaffinity(0))
    os.environ.pop("OMP_NUM_THREADS", None)
    pipes: dict[str, Connection] = {}
    processes, comparison = [], Comparison(config, {})
    try:
        for name in names:
            pipes[name], theirs = context.Pipe()
            processes.append(context.Process(target=_serve, args=(theirs, name, given, threads), daemon=True))
            processes[-1].start()
            theirs.close()
            comparison.results[name] = _receive(pipes[name], name)
            told(f"{name}: losses {', '.join(f'{x:.6f}' for x in comparison.results[name].losses)}")
        _check_same_work(comparison)
        for number in range(1, rounds + 1):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                pipes[name].send(number)
                seconds, rate = _receive(pipes[name], name)
                comparison.results[name].seconds.append(seconds)
                comparison.results[name].matmul.append(rate)
            told(f"round {number}: " + ", ".join(f"{n} {comparison.results[n].seconds[-1]:.3f} s" for n in names))
        for name in names:
            pipes[name].send(0)
            if name == "megacm3":
                pipes[name].send(top)
                comparison.profile = _receive(pipes[name], name) if top else None
            comparison.results[name].process_bytes = _receive(pipes[name], name)
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return comparison


def _receive(pipe: Connection, name: str) -> Any:
    try:
        return pipe.recv()
    except EOFError as fault:
        raise ConfigError(
            f"{name} left with an error (above); the shape must be one that all three can hold"
        ) from fault


def _check_same_work(comparison: Comparison) -> None:
    first = next(iter(comparison.results.values()))
    for result in comparison.results.values():
        near = all(abs(a - b) <= 1e-4 * abs(b) for a, b in zip(result.losses, first.losses, strict=True))
        if not near or result.parameters != first.parameters:
            raise ConfigError(
                f"{result.name} has losses {result.losses} with {result.parameters} parameters, {first.name} "
                f"{first.losses} with {first.parameters}: not the same work"
            )
