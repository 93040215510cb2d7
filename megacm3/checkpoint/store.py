"""Save and load a running engine: `save`, `load`, and `Saver` for saves in the background."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megacm3.checkpoint.commit import abandon, begin, commit, discover, remove_retired, temporary_folder
from megacm3.checkpoint.merged import is_adapter
from megacm3.checkpoint.pieces import Piece, index_of, joined_boxes, manifest_settings, trained_numel
from megacm3.checkpoint.reader import Checkpoint, Weights, key_of
from megacm3.checkpoint.state import collect, expected_tensors, fill, optimizer_step, settle, trained_boxes
from megacm3.checkpoint.tensors import Entry, file_bytes, in_file_order, write_tensors
from megacm3.errors import CheckpointError, Megacm3Error
from megacm3.faults import strike
from megacm3.files import sha256_file
from megacm3.parallel.context import ParallelContext
from megacm3.parallel.engine import Engine


def save(engine: Engine, context: ParallelContext, folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write and commit a step below `folder`; return its folder. Collective.

    state: JSON values that `load` gives back. keep: newest valid steps to keep, 0 = all. Raises CheckpointError on
    every rank when any rank fails; nothing of the step is left then, and earlier steps stay whole.
    """
    saver = Saver(engine, context, Path(folder), keep)
    saver.start(step, state)
    path = saver.finish()
    saver.close()
    assert path is not None
    return path


def load(engine: Engine, context: ParallelContext, step_folder: Path, *, optimizer: bool = True) -> dict[str, Any]:
    """Fill the engine from a committed step of any layout; return the state that was saved with it. Collective.

    Every file is hashed by one rank before any is used. With optimizer=False only the weights are taken. Raises
    CheckpointError, the same on every rank, naming the damaged file or the tensors that do not fit.
    """
    step_folder = Path(_everywhere(context, str(step_folder))[0])
    checkpoint, problem = _attempt(lambda: _checked(Checkpoint(step_folder), context))
    _agree(context, problem)
    if optimizer:
        boxes, wanted = joined_boxes(_everywhere(context, trained_boxes(engine))), _wanted(engine, context)
        _, problem = _attempt(lambda: _check_trained(checkpoint, boxes, engine, wanted))
        _agree(context, problem)
    _fill(engine, context, checkpoint, optimizer=optimizer)
    state: dict[str, Any] = checkpoint.state
    return state


def load_weights(engine: Engine, context: ParallelContext, opened: Callable[[], Weights]) -> Weights:
    """Fill the engine's weights from what `opened` gives on each rank; adapters keep their initial values. Collective.

    Raises CheckpointError, the same on every rank, for what cannot be opened, is damaged or does not fit.
    """

    def sound() -> Weights:
        weights = opened()
        return _checked(weights, context) if isinstance(weights, Checkpoint) else weights

    weights, problem = _attempt(sound)
    _agree(context, problem)
    _fill(engine, context, weights, optimizer=False)
    return weights


def _fill(engine: Engine, context: ParallelContext, weights: Weights, *, optimizer: bool) -> None:
    wanted = _wanted(engine, context)
    new = set() if optimizer else {name for name in wanted if is_adapter(name) and name not in weights.shapes}
    _, problem = _attempt(lambda: weights.check_tensors({n: shape for n, shape in wanted.items() if n not in new}))
    if problem is None:
        _, problem = _attempt(lambda: fill(engine, weights, optimizer=optimizer, new=new))
    _agree(context, problem)
    settle(engine)


def _wanted(engine: Engine, context: ParallelContext) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the ranks' models hold."""
    held = _everywhere(context, expected_tensors(engine))
    return {name: shape for tensors in held for name, shape in tensors.items()}


def _check_trained(
    checkpoint: Checkpoint, trained: dict[str, list[str]], engine: Engine, wanted: dict[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError when other parameters trained than those that train now: their moments would be missing."""
    for name, shape in checkpoint.shapes.items():
        # What does not fit at all is named by the check of names and shapes that follows.
        if wanted.get(name) != shape:
            continue
        if trained_numel(checkpoint.trained, name, shape) != trained_numel(trained, name, shape):
            then = checkpoint.config.get("train", {}).get("parameters", "all")
            raise CheckpointError(
                f"{checkpoint.folder} was made with train.parameters = {then}, and {name} trained otherwise than with "
                f"{engine.config.train.parameters} now; set it back, or begin a new train.out with checkpoint.init"
            )


def _checked(checkpoint: Checkpoint, context: ParallelContext) -> Checkpoint:
    """The checkpoint, once every file's hash is right; each rank takes its share of the files."""
    folder, names = checkpoint.folder, sorted(checkpoint.manifest.files)
    for name in names[context.rank :: context.world]:
        found, wanted = sha256_file(folder / name), checkpoint.manifest.files[name]["sha256"]
        if found != wanted:
            older = [path.name for path in discover(folder.parent) if path.name < folder.name]
            way = f"; remove {folder.name} to go on from {older[0]}, the newest older valid step" if older else ""
            raise CheckpointError(f"{folder / name} is damaged: sha256 {found}; its manifest says {wanted}{way}")
    return checkpoint


def _everywhere(context: ParallelContext, value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    values: list[Any] = [None] * context.world
    dist.all_gather_object(values, value, group=context.control_group)
    return values


def _agree(context: ParallelContext, problem: Exception | None) -> None:
    """Raise CheckpointError on every rank when any rank has a problem: the lowest rank's, in the same words."""
    for text in _everywhere(context, "" if problem is None else _words(problem)):
        if text:
            raise CheckpointError(text) from problem


def _words(problem: Exception) -> str:
    if isinstance(problem, OSError) and problem.filename:
        return f"{problem.filename}: {problem.strerror}"
    return str(problem) if isinstance(problem, Megacm3Error) else repr(problem)


def _attempt(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The result, or the error of what may fail on one rank only: the others must hear of it first."""
    try:
        return function(), None
    except (Megacm3Error, OSError, RuntimeError) as problem:
        return None, problem


class Saver:
    """Saves of one engine into one folder, at once or from copies in the background. All methods are collective."""

    def __init__(self, engine: Engine, context: ParallelContext, folder: Path, keep: int) -> None:
        self._engine, self._context, self._folder, self._keep = engine, context, folder, keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._copies: dict[str, torch.Tensor] = {}
        self._step = -1
        self._state: dict[str, Any] = {}
        self._index: dict[str, Any] = {}
        self._writing: Future[dict[str, Any]] | None = None
        self._removal: Future[None] | None = None
        self._begun = 0.0
        self.stall = 0.0
        """Seconds that the last save kept the training waiting."""
        self.total = 0.0
        """Seconds from the beginning of the last save to its commit."""

    def start(self, step: int, state: dict[str, Any], *, background: bool = False) -> None:
        """Begin to save; in the background it returns once copies are made, and `poll` or `finish` commits.

        Raises CheckpointError, on every rank, when there is no room or no right to write.
        """
        self.finish()
        self.close()
        self._begun, self.stall = time.monotonic(), 0.0
        pieces, problem = _attempt(lambda: collect(self._engine))
        _agree(self._context, problem)
        self._step, self._state = step, state
        partial = self._engine.config.train.parameters != "all"
        trained = trained_boxes(self._engine) if partial else None
        self._index = index_of(pieces, optimizer_step(self._engine), trained)
        needed = sum(_everywhere(self._context, file_bytes(_entries(pieces), self._metadata)))
        if self._context.rank == 0:
            _, problem = _attempt(lambda: begin(self._folder, step, needed))
        self._agree_or_abandon(problem)
        self._writing = Future()
        tensors = {key_of(piece.kind, piece.name, piece.box): piece.tensor for piece in pieces}
        entries = _entries(pieces)
        ready: dict[str, Future[torch.Tensor]] = {entry.key: Future() for entry in entries}
        if background:
            self._writing = self._thread.submit(self._write, entries, ready)
            self._copy(tensors, ready)
        else:
            for key, future in ready.items():
                future.set_result(tensors[key])
            written, problem = _attempt(lambda: self._write(entries, ready))
            self._writing.set_exception(problem) if problem else self._writing.set_result(written)
        self.stall = time.monotonic() - self._begun

    def poll(self) -> Path | None:
        """Commit the save under way if every rank has written its part; the step's folder, or None."""
        if self._writing is None:
            return None
        busy = torch.tensor([int(not self._writing.done())])
        dist.all_reduce(busy, dist.ReduceOp.MAX, group=self._context.control_group)
        return None if busy.item() else self.finish()

    def finish(self) -> Path | None:
        """Wait for the save under way and commit it; the step's folder, None where there is none.

        Raises CheckpointError on every rank when it failed on any.
        """
        if self._writing is None:
            return None
        begun = time.monotonic()
        written, problem = _attempt(self._writing.result)
        self._writing = None
        self._agree_or_abandon(problem)
        parts = _everywhere(self._context, {"file": self._name, "entry": written, **self._index})
        if self._context.rank == 0:
            _, problem = _attempt(lambda: self._commit(parts))
        self._agree_or_abandon(problem)
        now = time.monotonic()
        self.stall, self.total = self.stall + now - begun, now - self._begun
        return self._folder / f"step_{self._step:06d}"

    def close(self) -> None:
        """Wait until old steps are deleted."""
        if self._removal is not None:
            self._removal.result()
            self._removal = None

    def _copy(self, tensors: dict[str, torch.Tensor], ready: dict[str, Future[torch.Tensor]]) -> None:
        """Copy into host memory that is kept from save to save: fresh pages cost more than the copy.

        In the order of the file, whose writing begins with the first copy. What goes wrong, the writing thread tells.
        """
        pinned, held, self._copies = self._context.device.type == "cuda", self._copies, {}
        try:
            for key, future in ready.items():
                tensor, copy = tensors[key], held.pop(key, None)
                if copy is None or copy.dtype != tensor.dtype:
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
                self._copies[key] = copy.copy_(tensor, non_blocking=pinned)
                if not pinned:
                    future.set_result(copy)
            if pinned:
                torch.cuda.synchronize()
                for key, future in ready.items():
                    future.set_result(self._copies[key])
        except RuntimeError as problem:
            _fail(ready, problem)
        except BaseException:
            _fail(ready, RuntimeError("the copy for a save was interrupted"))
            raise

    @property
    def _name(self) -> str:
        return f"rank_{self._context.rank:05d}.safetensors"

    @property
    def _metadata(self) -> dict[str, str]:
        return {"format": "pt", "step": str(self._step)}

    def _agree_or_abandon(self, problem: Exception | None) -> None:
        try:
            _agree(self._context, problem)
        except CheckpointError:
            if self._context.rank == 0:
                abandon(self._folder, self._step)
            raise

    def _write(self, entries: list[Entry], ready: dict[str, Future[torch.Tensor]]) -> dict[str, Any]:
        path = temporary_folder(self._folder, self._step) / self._name
        where = {"rank": self._context.rank, "step": self._step}

        def values(entry: Entry) -> Iterator[torch.Tensor]:
            strike("save.writing", **where)
            yield ready[entry.key].result()

        try:
            strike("save.before_write", **where)
            written = write_tensors(path, entries, self._metadata, values)
            strike("save.written", **where)
        except OSError as fault:
            why = f"{path} could not be written: {fault.strerror}"
            raise CheckpointError(f"{why}; nothing of this step is left, earlier ones are whole") from fault
        return written

    def _commit(self, parts: list[dict[str, Any]]) -> None:
        context, engine = self._context, self._engine
        steps = {part["optimizer_step"] for part in parts} - {-1}
        assert len(steps) <= 1, f"the ranks' optimizers counted different steps: {steps}"
        layout = {"world": context.world, "tensor": context.tensor, "data": context.data, "pipeline": context.pipeline}
        settings = manifest_settings(
            step=self._step,
            optimizer_step=max(steps, default=0),
            layout=layout | {"zero": engine.zero_stage},
            config=dataclasses.asdict(engine.config),
            state=self._state,
            parts=parts,
        )
        files = {part["file"]: part["entry"] for part in parts}
        retired = commit(self._folder, self._step, settings, {}, files, self._keep)
        self._removal = self._thread.submit(remove_retired, retired)


def _entries(pieces: list[Piece]) -> list[Entry]:
    return in_file_order(Entry(key_of(p.kind, p.name, p.box), p.tensor.dtype, p.box.shape) for p in pieces)


def _fail(ready: dict[str, Future[torch.Tensor]], problem: Exception) -> None:
    for future in ready.values():
        if not future.done():
            future.set_exception(problem)
