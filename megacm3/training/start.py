"""Where a run's first weights come from (checkpoint.init): a native checkpoint or a Hugging Face folder, never silently
another model's."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacm3.checkpoint.commit import discover
from megacm3.checkpoint.merged import open_merged
from megacm3.checkpoint.reader import Weights
from megacm3.checkpoint.reshard import config_of, find_step
from megacm3.checkpoint.store import load_weights
from megacm3.config import Config, ModelConfig
from megacm3.convert.carried import tokenizers_in
from megacm3.convert.configs import SIDECAR
from megacm3.convert.folder import HfFolder
from megacm3.convert.from_hf import HfWeights
from megacm3.convert.meta import is_meta_folder
from megacm3.data.stream import Stream
from megacm3.errors import CheckpointError
from megacm3.files import MANIFEST, read_json, read_manifest
from megacm3.parallel.context import ParallelContext
from megacm3.parallel.engine import Engine
from megacm3.tokenizers.vocabulary import Vocabulary

log = logging.getLogger(__name__)
ROLES = ("text_tokenizer", "image_tokenizer")
_FREE = ("preset", "vocab_rows", "dropout", "init", "init_std", "init_positions_std", "init_residual")
"""Fields of the model that may differ: they change no logit of a model that is not training."""


@dataclass(frozen=True)
class Start:
    """Weights to begin with, and what they were made for."""

    weights: Weights
    model: ModelConfig
    vocabulary: dict[str, Any] | None
    tokenizers: dict[str, str]
    """Role -> fingerprint, of those that are known."""
    origin: str
    """Fingerprint of the step, or of the step that the folder was exported from; empty where nothing says it."""


def open_start(path: str | Path) -> Start:
    """What checkpoint.init names: a run, its checkpoints, a step, or a Hugging Face folder of safetensors.

    Raises CheckpointError when there is none of them, or it is not whole.
    """
    path = Path(path)
    if is_meta_folder(path):
        raise CheckpointError(
            f"checkpoint.init = {path} holds Meta's form of weights; make a checkpoint of it first: "
            "tools/convert_checkpoint.py from-hf"
        )
    if (path / "config.json").is_file() and not (path / MANIFEST).is_file():
        return _from_folder(path)
    try:
        step = find_step(path)
    except CheckpointError as fault:
        raise CheckpointError(
            f"checkpoint.init: {fault}, or a Hugging Face folder (config.json and model.safetensors)"
        ) from fault
    checkpoint = open_merged(step)
    state, config = checkpoint.state, config_of(checkpoint.config, 1, 1)
    tokenizers = _fingerprints(tokenizers_in(step)) | (state.get("tokenizers") or {})
    return Start(checkpoint, config.model, state.get("vocabulary"), tokenizers, checkpoint.manifest.fingerprint)


def _from_folder(path: Path) -> Start:
    weights = HfWeights(HfFolder(path))
    source: dict[str, Any] = {}
    if (path / SIDECAR).is_file():
        source = read_json(path / SIDECAR, error=CheckpointError).get("source") or {}
    tokenizers = {role: source[role] for role in ROLES if source.get(role)} | _fingerprints(weights.source.tokenizers)
    vocabulary = weights.vocabulary.get("vocabulary")
    return Start(weights, weights.model, vocabulary, tokenizers, str(source.get("checkpoint", "")))


def _fingerprints(folders: dict[str, Path]) -> dict[str, str]:
    return {role: read_manifest(folder, role, error=CheckpointError).fingerprint for role, folder in folders.items()}


def check_init(config: Config) -> None:
    """Compare the model that checkpoint.init names with the config's, before the latter is built.

    Raises CheckpointError naming the key that differs, or when there are no whole weights. A run that has checkpoints
    of its own needs no others.
    """
    own = config.checkpoint.resume != "never" and discover(Path(config.train.out) / "checkpoints")
    if config.checkpoint.init and not own:
        where = f"checkpoint.init = {config.checkpoint.init}"
        _check_model(open_start(config.checkpoint.init).model, config.model, where)


def run_tokenizers(stream: Stream) -> dict[str, str]:
    """Role -> fingerprint of the tokenizers that made the run's stores; all stores have the same."""
    inputs = getattr(stream.sources[0].store, "inputs", {})
    return {role: inputs[role] for role in ROLES if inputs.get(role)}


def check_fits(start: Start, config: Config, stream: Stream, where: str) -> list[str]:
    """What could not be checked because the source does not say it, in words.

    Raises CheckpointError, naming the key, for another model, another table of ids or other tokenizers.
    """
    _check_model(start.model, config.model, where)
    own, unknown = stream.vocabulary, []
    if start.vocabulary is None:
        unknown.append("vocabulary")
    elif Vocabulary.from_json(start.vocabulary).fingerprint != own.fingerprint:
        theirs = Vocabulary.from_json(start.vocabulary)
        raise CheckpointError(
            f"{where} was trained with another vocabulary ({_told(theirs)}); found that of the stores ({_told(own)}); "
            "make the stores with the tokenizers of that model"
        )
    for role, fingerprint in run_tokenizers(stream).items():
        known = start.tokenizers.get(role)
        if known is None:
            unknown.append(role)
        elif known != fingerprint:
            raise CheckpointError(
                f"{where} was trained with the {role} {known[:12]}; the stores of data.mixture were made with "
                f"{fingerprint[:12]}: make them with the tokenizers of that model"
            )
    return unknown


def _told(vocabulary: Vocabulary) -> str:
    return (
        f"{vocabulary.family}, {vocabulary.text_size} text ids, {vocabulary.codebook_size} codes, "
        f"{vocabulary.sentinels} sentinels, {vocabulary.image_tokens} codes a picture"
    )


def _check_model(theirs: ModelConfig, ours: ModelConfig, where: str) -> None:
    free = {*_FREE, *(() if ours.positions == "learned" else ("sequence_length",))}
    free |= {"rope_theta"} if ours.positions == "learned" else set()
    free |= {"qk_norm_groups"} if ours.qk_norm == "none" else set()
    for field in dataclasses.fields(ModelConfig):
        then, now = getattr(theirs, field.name), getattr(ours, field.name)
        if field.name not in free and then != now:
            key = f"model.{field.name}"
            raise CheckpointError(f"{where} has {key} = {then}; the config has {now}: set {key}={then}")


def begin_with(engine: Engine, context: ParallelContext, config: Config, stream: Stream) -> dict[str, Any]:
    """Fill a new engine with the weights of checkpoint.init; say where they came from. Collective.

    Raises CheckpointError, the same on every rank, when they are damaged or do not fit.
    """
    where, unknown = f"checkpoint.init = {config.checkpoint.init}", []
    found: list[Start] = []

    def opened() -> Weights:
        found.append(open_start(config.checkpoint.init))
        unknown.extend(check_fits(found[0], config, stream, where))
        return found[0].weights

    weights = load_weights(engine, context, opened)
    if context.rank == 0:
        log.info("step 0 begins with the weights of %s", weights.folder)
        for what in unknown:
            log.warning("%s does not say its %s: whether it is the stores' could not be checked", where, what)
    return {"folder": str(weights.folder), "fingerprint": found[0].origin}
