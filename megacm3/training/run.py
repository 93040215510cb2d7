"""Everything a training run holds, built in the order in which things can go wrong."""

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megacm3.checkpoint.commit import discover
from megacm3.checkpoint.reader import Checkpoint
from megacm3.checkpoint.store import Saver, load
from megacm3.config import Config, total_steps
from megacm3.data.build import build_stream
from megacm3.data.loader import Loader, Step, check_resume
from megacm3.data.stream import Stream
from megacm3.errors import CheckpointError, ConfigError, Diverged
from megacm3.faults import strike
from megacm3.parallel.context import ParallelContext
from megacm3.parallel.engine import Engine
from megacm3.parallel.replicated import check_replicas
from megacm3.resolve import save_config
from megacm3.training.agreement import changed_keys, free_parts, versions
from megacm3.training.guards import Guards, RollBack
from megacm3.training.held_out import HeldOut, open_held_out
from megacm3.training.lock import FolderLock
from megacm3.training.metrics import Metrics
from megacm3.training.probe import check_probe, probe
from megacm3.training.resume import choose_step, on_main
from megacm3.training.start import begin_with, run_tokenizers
from megacm3.training.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass
class Run:
    """The parts of a run, and where it stands."""

    config: Config
    context: ParallelContext
    stream: Stream
    engine: Engine
    saver: Saver
    guards: Guards
    watchdog: Watchdog
    out: Path
    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens of these steps, padding included."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run's files."""
        return self.context.rank == 0

    @property
    def last_step(self) -> int:
        """The step after which this start leaves."""
        steps = total_steps(self.config)
        return min(steps, self.config.train.stop_at or steps)

    def loader(self) -> Loader:
        """Steps from where the run stands."""
        config, context = self.config, self.context
        return Loader(
            self.stream,
            context.data_rank,
            context.data,
            config.train.micro_batch,
            config.train.global_batch,
            start_step=self.step,
            workers=config.data.workers,
            start_sequence=self._sequence,
            skip=self.guards.skip_sequences,
        )

    held_out: HeldOut | None = None
    """What is measured while training."""
    overrides: list[dict[str, Any]] = field(default_factory=list)
    """Config keys that were changed on the way: key, was, now, step."""
    stopping: bool = False
    """Whether it leaves after this step's save, which then must not fail."""
    init: dict[str, Any] | None = None
    """Where the weights of step 0 came from, when they were not drawn."""
    _sequence: int = 0
    _stall: float = 0.0

    @property
    def save_is_due(self) -> bool:
        """Whether the config wants a checkpoint of this step."""
        every = self.config.checkpoint.every
        return self.step == self.last_step or (every > 0 and self.step % every == 0)

    def advance(self, batch: Step) -> None:
        """Count one finished step."""
        self.step += 1
        self.engine.poison.step = self.step + 1
        self._sequence = batch.first_sequence + self.config.train.global_batch
        self.tokens += self.config.train.global_batch * self.config.model.sequence_length

    def check_replicas(self) -> None:
        """Raise CheckpointError when ranks that should hold the same parameters do not. Collective."""
        if strike("replica", rank=self.context.rank, step=self.step) == "perturb":
            with torch.no_grad():
                replicated = [p for p in self.engine.module.parameters() if not p.tensor_model_parallel]  # type: ignore[attr-defined]
                (replicated or list(self.engine.module.parameters()))[0].view(-1)[0] += 1
        check_replicas(self.engine.module, self.context, data=self.engine.zero_stage < 3)

    def save(self, metrics: Metrics) -> None:
        """Check the replicas, then save this step, in the background where the config says so. Collective."""
        begun = time.monotonic()
        self.finish(metrics)
        self.check_replicas()
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "sequence": self._sequence,
            "stream": self.stream.description,
            "probe": probe(self.engine, self.config),
            "config": dataclasses.asdict(self.config),
            "vocabulary": self.stream.vocabulary.to_json(),
            "tokenizers": run_tokenizers(self.stream),
            "init": self.init,
            "guards": self.guards.state(),
            "overrides": self.overrides,
            "went_back": self.config.checkpoint.step,
            "versions": versions(),
        }
        self.watchdog.phase("save")
        background = self.config.checkpoint.background
        self._try(lambda: self.saver.start(self.step, state, background=background))
        self._stall = time.monotonic() - begun
        if not background:
            self.finish(metrics)

    def evaluate(self, metrics: Metrics) -> None:
        """Measure the held-out documents after this step, where the config says so. Collective."""
        if self.held_out is not None and self.held_out.due(self.step):
            metrics.evaluated(self.held_out.measure(self.engine))

    def poll(self, metrics: Metrics) -> None:
        """Commit the save in the background if every rank has written its part. Collective."""
        self._wait_for(self.saver.poll, metrics)

    def finish(self, metrics: Metrics) -> None:
        """Wait for the save in the background, if there is one, and commit it. Collective."""
        self._wait_for(self.saver.finish, metrics)

    def _wait_for(self, act: Callable[[], Path | None], metrics: Metrics) -> None:
        begun = time.monotonic()
        path = self._try(act)
        self._stall += time.monotonic() - begun
        self._committed(path, metrics)

    def _try(self, act: Callable[[], Path | None]) -> Path | None:
        try:
            return act()
        except CheckpointError as error:
            if self.config.checkpoint.on_failure == "stop" or self.step >= self.last_step or self.stopping:
                raise
            if self.is_main:
                log.error("not saved: %s; training goes on (checkpoint.on_failure = continue)", error)
            return None

    def _committed(self, path: Path | None, metrics: Metrics) -> None:
        if path is None:
            return
        metrics.saved(self._stall, self.saver.total)
        if self.is_main:
            log.info("saved %s in %.1f s; the training waited %.1f s", path, self.saver.total, self._stall)

    def keep_what_is_saved(self) -> None:
        """Commit the save in the background before the run ends with an error of its own. Collective."""
        try:
            self.saver.finish()
        except CheckpointError as error:
            if self.is_main:
                log.error("not saved: %s", error)

    def resume(self) -> None:
        """Continue from a valid checkpoint, as checkpoint.resume and .step say; else begin with checkpoint.init.

        Collective. Raises CheckpointError when the one asked for is not there, or when what was saved does not fit.
        """
        folder, settings = self.out / "checkpoints", self.config.checkpoint
        found = on_main(self.context, lambda: choose_step(folder, settings))
        if found is not None:
            return self._continue(found)
        if settings.init:
            self.init = begin_with(self.engine, self.context, self.config, self.stream)
        elif self.is_main:
            log.info("no checkpoint in %s: starting from step 0 with seed %d", folder, self.config.train.seed)
        self.engine.poison.step = 1

    def _continue(self, path: Path) -> None:
        saved = Checkpoint(path)
        changes = changed_keys(saved.config, self.config)
        state = load(self.engine, self.context, path)
        check_resume(state["stream"], self.stream, free_parts(self.config.checkpoint.override))
        self.step, self.tokens, self._sequence = state["step"], state["tokens"], state["sequence"]
        self.engine.poison.step = self.step + 1
        self.init = state.get("init")
        self.overrides = [*state["overrides"], *(change._asdict() | {"step": self.step} for change in changes)]
        self.guards.restore(state["guards"])
        dtypes = (saved.config["train"]["dtype"], self.config.train.dtype)
        difference = check_probe(state["probe"], probe(self.engine, self.config), dtypes, path)
        if self.is_main:
            for change in changes:
                log.warning("%s was %s, is %s from step %d on", *change, self.step)
            for name, now in versions().items():
                then = state["versions"].get(name, now)
                if then != now:
                    log.warning("%s is %s now; the checkpoint was made with %s", name, now, then)
            log.info(
                "resumed %s: step %d, %d tokens; logits of the fixed batch differ by %.1e of their root mean square",
                *(path, self.step, self.tokens, difference),
            )

    def roll_back(self, wish: RollBack) -> None:
        """Go back to the newest checkpoint and leave out the sequences that made it necessary. Collective."""
        self.saver.finish()
        found = on_main(self.context, lambda: next(iter(discover(self.out / "checkpoints")), None))
        if found is None:
            raise Diverged(f"{wish} made a step that is not finite, and there is no checkpoint to go back to")
        self.guards.left_out.append([wish.first, wish.end])
        if self.is_main:
            log.warning("going back to %s; %s are left out from now on", found, wish)
        self._continue(found)


def claim_folder(out: Path) -> FolderLock:
    """Make a run's folder, write a byte there, and lock it. Raises ConfigError. Called on one rank."""
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        written = out / "checkpoints" / ".probe"
        written.write_bytes(b"0")
        written.unlink()
        lock = FolderLock(out)
        lock.acquire()
    except OSError as fault:
        raise ConfigError(f"{out} cannot be written: {fault.strerror}; give another train.out") from fault
    return lock


def build_run(config: Config, context: ParallelContext, watchdog: Watchdog) -> Run:
    """Stream, engine and guards of a run whose folder is claimed. Raises ConfigError or DataError."""
    stream = build_stream(config)
    held_out = open_held_out(config, context, stream)
    out = Path(config.train.out)
    if context.rank == 0:
        save_config(config, out / "config.yaml", versions())
    dist.barrier(group=context.control_group)
    kinds = torch.from_numpy(stream.vocabulary.kind.copy())
    engine = Engine(config, context, kinds)
    saver = Saver(engine, context, out / "checkpoints", config.checkpoint.keep)
    engine.on_phase = watchdog.phase
    return Run(config, context, stream, engine, saver, Guards(config), watchdog, out, held_out=held_out)
