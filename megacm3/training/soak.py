"""A small run that is killed again and again and must end as if nothing had been: parameters, moments and curve alike.

Ranks are started again after exit codes 6, 75 and after a kill, as the recipes do; any other code, a rank that does not
leave by itself, or a bit that differs is a failure. Before the first step of a start, a launcher's part is played too:
ranks that wait for one that died while it was importing are ended. Moments and victims are drawn from a seed.
"""

import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megacm3.errors import CheckpointError, Megacm3Error, PeerLost, Stopped
from megacm3.files import read_json, write_json

log = logging.getLogger(__name__)
KINDS = ("kill -9 of one rank", "kill -9 of all ranks", "SIGTERM to one rank")
LEAVE_SECONDS = 120.0
"""The other ranks must be gone by then."""
GRACE_SECONDS = 15.0
"""So long a launcher waits for ranks that have not begun."""
START_SECONDS = 12.0
"""A fifth of the kills falls on a moment up to here after the start, whatever the run does then."""

CONFIG = """
model: {{preset: tiny_modern, layers: 2, dropout: 0.1, vocab_size: 512, sequence_length: 96}}
parallel: {{recompute: full}}
data: {{mixture: [{{store: {store}}}], packing: whole}}
retrieval: {{documents: [1, 0, 0, 0]}}
optimizer: {{lr: 1.0e-2, schedule: {{warmup: 20}}}}
train: {{steps: {steps}, micro_batch: 2, global_batch: 8, dtype: fp32, device: cpu}}
checkpoint: {{every: 3, keep: 3}}
log: {{every: 1, tensorboard: false}}
"""


@dataclass
class Kill:
    """One kill and what it led to."""

    kind: str
    step: int
    """Last step that was logged before it."""
    codes: list[int]
    seconds: float
    """From the kill until the last rank was gone."""
    lost: int
    """Steps that had to be done again."""
    helped: bool
    """Whether ranks that had not begun to train had to be ended."""


@dataclass
class Soak:
    """The state of a soak, kept in `folder`/soak.json so that it can be stopped and continued."""

    folder: Path
    ranks: int
    kills: int
    seed: int
    done: list[Kill] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Of the run: a dozen between two kills."""
        return 12 * (self.kills + 1)

    def prepare(self) -> None:
        """Make the store and the config, or read what an earlier call left. Raises CheckpointError for another soak."""
        known = self.folder / "soak.json"
        wanted = {"ranks": self.ranks, "kills": self.kills, "seed": self.seed}
        if known.exists():
            state = read_json(known)
            if {name: state[name] for name in wanted} != wanted:
                raise CheckpointError(f"{self.folder} holds another soak; give another --output")
            self.done = [Kill(**kill) for kill in state["done"]]
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        _make_store(self.folder / "store")
        text = CONFIG.format(store=self.folder / "store", steps=self.steps)
        (self.folder / "config.yaml").write_text(text, encoding="utf-8")
        self._write()

    def _write(self) -> None:
        state = {"ranks": self.ranks, "kills": self.kills, "seed": self.seed}
        write_json(self.folder / "soak.json", state | {"done": [asdict(kill) for kill in self.done]})

    def unbroken(self) -> None:
        """The run without kills, if it is not there yet."""
        if not (self.folder / "unbroken" / "checkpoints" / f"step_{self.steps:06d}").is_dir():
            self._to_the_end("unbroken")

    def next_kill(self) -> Kill:
        """Start the run, kill it at the moment that is due, and see how it ends."""
        moments = random.Random(f"{self.seed} {len(self.done)}")
        kind, out = moments.choice(KINDS), self.folder / "soaked"
        launch = Launch(self, "soaked")
        before = _last_step(out)
        target = 12 * len(self.done) + moments.randrange(12)
        if moments.random() < 0.2:
            launch.wait(moments.uniform(0.0, START_SECONDS), lambda: False)
        else:
            launch.wait(LEAVE_SECONDS, lambda: _last_step(out) >= max(target, before + 1))
            launch.wait(moments.uniform(0.0, 0.2), lambda: False)
        victims = list(range(self.ranks)) if kind == KINDS[1] else [moments.randrange(self.ranks)]
        number = signal.SIGTERM if kind == KINDS[2] else signal.SIGKILL
        training, struck = _last_step(out) > before, time.monotonic()
        for rank in victims:
            launch.processes[rank].send_signal(number)
        helped = not training and launch.end_the_rest()
        codes = launch.codes()
        reached = _last_step(out)
        kill = Kill(kind, reached, codes, time.monotonic() - struck, max(0, reached - _saved_step(out)), helped)
        self.done.append(kill)
        self._write()
        return kill

    def finish(self) -> dict[str, Any]:
        """Run to the end and compare with the unbroken run. Raises CheckpointError naming what differs."""
        self._to_the_end("soaked")
        whole, soaked = self.folder / "unbroken", self.folder / "soaked"
        tensors, differing = _differing(*(run / "checkpoints" / f"step_{self.steps:06d}" for run in (whole, soaked)))
        if differing:
            raise CheckpointError(f"{len(differing)} of {tensors} tensors differ, among them {differing[0]}")
        if _curve(whole) != _curve(soaked):
            raise CheckpointError("the parameters are equal, but the curves in metrics.jsonl differ")
        left = [path.name for path in (soaked / "checkpoints").glob(".*")]
        if left:
            raise CheckpointError(f"saves that did not finish left {left}")
        return {"tensors": tensors, "steps": self.steps}

    def _to_the_end(self, name: str) -> None:
        codes = Launch(self, name).codes(timeout=600.0)
        if any(codes):
            raise Megacm3Error(f"the run ended with exit codes {codes}; expected 0. See {self.folder}/{name}.log")


class Launch:
    """The processes of one start."""

    def __init__(self, soak: Soak, name: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self._log, self._ranks = soak.folder / f"{name}.log", soak.ranks
        arguments = [str(soak.folder / "config.yaml"), f"train.out={soak.folder / name}"]
        shared = {"WORLD_SIZE": str(soak.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "LOCAL_WORLD_SIZE": str(soak.ranks)}
        with self._log.open("a", encoding="utf-8") as output:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, "-m", "megacm3.train", *arguments],
                    env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output,
                    stderr=output,
                )
                for rank in range(soak.ranks)
            ]

    def wait(self, seconds: float, until: Any) -> None:
        """Until `until()`, or the end of a process, or so many seconds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not until() and all(p.poll() is None for p in self.processes):
            time.sleep(0.01)

    def end_the_rest(self) -> bool:
        """Kill what is still there after a while; whether there was anything."""
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and any(p.poll() is None for p in self.processes):
            time.sleep(0.05)
        left = [process for process in self.processes if process.poll() is None]
        for process in left:
            process.kill()
        return bool(left)

    def codes(self, timeout: float = LEAVE_SECONDS) -> list[int]:
        """Exit codes once all are gone. Raises PeerLost for a rank that stays, Megacm3Error for a code that no recipe
        starts again after.
        """
        deadline = time.monotonic() + timeout
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired as fault:
                for other in self.processes:
                    other.kill()
                    other.wait()
                raise PeerLost(f"a rank was still there {timeout:.0f} s later; see {self._log}") from fault
        codes = [process.returncode for process in self.processes]
        odd = [
            c for c in codes if c not in (0, PeerLost.exit_code, Stopped.exit_code, -signal.SIGKILL, -signal.SIGTERM)
        ]
        if odd:
            raise Megacm3Error(f"exit codes {codes}; expected 0, 6, 75 or those of the kill. See {self._log}")
        return codes


def table(kills: list[Kill]) -> str:
    """Kills by kind: how many, seconds until all ranks were gone, steps done again, exit codes of the ranks.

    Seconds of starts that had to be ended (see `Kill.helped`) are left out.
    """
    lines = ["kind                   kills  in start   gone after (s)       steps done again    exit codes"]
    for kind in KINDS:
        of = [kill for kill in kills if kill.kind == kind]
        if not of:
            continue
        seconds, lost = [kill.seconds for kill in of if not kill.helped] or [0.0], [kill.lost for kill in of]
        codes = sorted({code for kill in of for code in kill.codes})
        lines.append(
            f"{kind:22} {len(of):5} {sum(kill.helped for kill in of):9}   "
            f"mean {np.mean(seconds):4.1f} max {max(seconds):4.1f}    "
            f"mean {np.mean(lost):4.1f} max {max(lost):3}   {codes}"
        )
    return "\n".join(lines)


def _make_store(folder: Path) -> None:
    from megacm3.data.documents import IMAGE, TEXT
    from megacm3.data.parts import write_store
    from megacm3.data.store import StoreShape

    rng = np.random.default_rng(0)

    def pairs() -> Any:
        for number in range(256):
            caption = rng.integers(0, 256, rng.integers(2, 8))
            codes = (caption[0] * 7 + np.arange(16) * 3) % 128
            yield [(TEXT, caption), (IMAGE, codes)], {"key": f"{number:04d}", "caption": f"caption {number}"}

    write_store(folder, pairs(), StoreShape(256, 128, 16, image_size=32), None, documents_per_part=128)


def _last_step(out: Path) -> int:
    try:
        return int(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    except (OSError, IndexError, ValueError):
        return 0


def _saved_step(out: Path) -> int:
    return max((int(path.parent.name[5:]) for path in out.glob("checkpoints/step_*/manifest.json")), default=0)


def _curve(out: Path) -> list[Any]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in ("step", "loss", "grad_norm", "samples")] for line in lines]


def _differing(first: Path, second: Path) -> tuple[int, list[str]]:
    """Tensors of a step (parameters, moments), and those that are not bitwise equal in another."""
    import torch

    from megacm3.checkpoint.boxes import whole
    from megacm3.checkpoint.reader import Checkpoint

    one, other = Checkpoint(first, verify="sha256"), Checkpoint(second, verify="sha256")
    differing, count = [], 0
    for kind, dtype in one.kinds.items():
        for name, shape in one.shapes.items():
            a, b = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
            one.read(kind, name, whole(shape), a)
            other.read(kind, name, whole(shape), b)
            count += 1
            if not torch.equal(a, b):
                differing.append(f"{kind} {name}")
    return count, differing
