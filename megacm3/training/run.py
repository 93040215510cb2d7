"""Everything a training run holds, built in the order in which things can go wrong."""

import dataclasses
import logging
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megacm3.checkpoint.commit import discover
from megacm3.checkpoint.store import load, save
from megacm3.config import Config
from megacm3.data.build import build_stream
from megacm3.data.loader import Loader, check_resume
from megacm3.data.stream import Stream
from megacm3.errors import CheckpointError
from megacm3.parallel.context import ParallelContext
from megacm3.parallel.engine import Engine
from megacm3.parallel.replicated import check_replicas
from megacm3.resolve import save_config

log = logging.getLogger(__name__)
LIBRARIES = ("torch", "megatron-core", "deepspeed", "numpy", "safetensors", "sentencepiece", "diffusers")


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    from megacm3 import __version__

    found = {"megacm3": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@dataclass
class Run:
    """The parts of a run, and where it stands."""

    config: Config
    context: ParallelContext
    stream: Stream
    engine: Engine
    out: Path
    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens of these steps, padding included."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run's files."""
        return self.context.rank == 0

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
        )

    _sequence: int = 0

    def advance(self) -> None:
        """Count one finished step."""
        self.step += 1
        self._sequence += self.config.train.global_batch
        self.tokens += self.config.train.global_batch * self.config.model.sequence_length

    def _probe(self) -> float | None:
        """Loss of a fixed batch: stored with a checkpoint and compared after it is loaded."""
        if self.context.pipeline > 1:
            return None
        length, size = self.config.model.sequence_length, self.config.model.vocab_size
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, size, (1, length + 1), generator=generator)
        batch = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "documents": torch.zeros(1, length, dtype=torch.int32),
            "numbers": torch.zeros(1, dtype=torch.int64),
        }
        sums = self.engine.evaluate([batch])
        return float(sums[0] / sums[3])

    def save(self) -> None:
        """Check the replicas, then commit a checkpoint of this step. Collective."""
        begun = time.monotonic()
        check_replicas(self.engine.module, self.context)
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "sequence": self._sequence,
            "stream": self.stream.description,
            "probe_loss": self._probe(),
            "config": dataclasses.asdict(self.config),
            "vocabulary": self.stream.vocabulary.to_json(),
            "versions": versions(),
        }
        folder = self.out / "checkpoints"
        path = save(self.engine, self.context, folder, self.step, state, self.config.checkpoint.keep)
        if self.is_main:
            log.info("saved %s in %.1f s", path, time.monotonic() - begun)

    def resume(self) -> None:
        """Continue from the newest valid checkpoint, as checkpoint.resume says. Collective.

        Raises CheckpointError when one is required and there is none, or when what was saved does not fit.
        """
        wanted, folder = self.config.checkpoint.resume, self.out / "checkpoints"
        found = discover(folder) if wanted != "never" else []
        if not found:
            if wanted == "required":
                raise CheckpointError(
                    f"checkpoint.resume = required, but {folder} holds no valid checkpoint; "
                    "set checkpoint.resume=auto to start from the beginning"
                )
            if self.is_main:
                log.info("no checkpoint in %s: starting from step 0 with seed %d", folder, self.config.train.seed)
            return
        state = load(self.engine, self.context, found[0])
        check_resume(state["stream"], self.stream)
        self.step, self.tokens, self._sequence = state["step"], state["tokens"], state["sequence"]
        self._check_probe(state, found[0])
        if self.is_main:
            for name, now in versions().items():
                then = state["versions"].get(name, now)
                if then != now:
                    log.warning("%s is %s now; the checkpoint was made with %s", name, now, then)
            log.info("resumed %s: step %d, %d tokens", found[0], self.step, self.tokens)

    def _check_probe(self, state: dict[str, Any], path: Path) -> None:
        then, now = state["probe_loss"], self._probe()
        if then is not None and now is not None and abs(then - now) > 1e-3 * abs(then):
            raise CheckpointError(
                f"{path} was loaded, but the loss of its fixed batch is {now:.6f}; when it was saved it was {then:.6f}"
            )


def build_run(config: Config, context: ParallelContext) -> Run:
    """Stream, engine and folder of a run. Raises ConfigError or DataError before anything is written."""
    stream = build_stream(config)
    out = Path(config.train.out)
    if context.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        save_config(config, out / "config.yaml", versions())
    dist.barrier(group=context.control_group)
    kinds = torch.from_numpy(stream.vocabulary.kind.copy())
    engine = Engine(config, context, kinds)
    return Run(config, context, stream, engine, out)
