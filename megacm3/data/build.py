"""The stream of a run, from its config: opens stores and neighbours, and refuses what does not belong together."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from megacm3.config import Config, total_steps
from megacm3.data.documents import ANSWER, Layout
from megacm3.data.mixture import Mixture, Stage, balanced_weights, capped_weights, limit_epochs
from megacm3.data.store import Store
from megacm3.data.stream import Stream
from megacm3.data.windows import PROBES, SamplerLike, Source, StreamSettings
from megacm3.errors import ConfigError, DataError
from megacm3.files import read_manifest
from megacm3.tokenizers.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_SPECIALS = 5
"""Special ids of CM3Leon's layout beside the sentinels: pad, end, break, end of span, end of turn."""


def build_stream(config: Config) -> Stream:
    """The stream that `config` describes (its model, data, objective, retrieval and train sections).

    Raises ConfigError or DataError, before any training, for a missing or damaged store, stores of different
    tokenizers, a vocabulary that is not the model's, documents that do not fit, labels that would all be masked, wrong
    weights.
    """
    stores = open_stores(config)
    vocabulary = run_vocabulary(config, stores)
    settings = _settings(config, vocabulary)
    if settings.packing == "whole":
        _check_longest(stores, settings, vocabulary)
    if not settings.spans:
        _check_order(stores)
    sources = []
    for entry, store in zip(config.data.mixture, stores, strict=True):
        sampler, retrieval = _sampler(config, entry.neighbours, store)
        origin = {"store": store.fingerprint, "retrieval": retrieval}
        sources.append(Source(entry.store, store, sampler, origin))
    stream = _with_stages(config, sources, vocabulary, settings)
    if settings.answers_only:
        _check_answers(stream)
    _report(stream)
    return stream


def open_stores(config: Config) -> list[Store]:
    """The stores of data.mixture. Raises ConfigError when it is empty, DataError when a store is missing or damaged."""
    if not config.data.mixture:
        raise ConfigError("data.mixture is empty; expected at least one {store: FOLDER} made by tools/pretokenize.py")
    stores = []
    for i, entry in enumerate(config.data.mixture):
        if not entry.store:
            raise ConfigError(f"data.mixture[{i}].store is empty; expected a folder made by tools/pretokenize.py")
        if not Path(entry.store).is_dir():
            raise DataError(f"data.mixture[{i}].store = {entry.store} does not exist; expected a token store")
        stores.append(Store.open(entry.store))
    return stores


def run_vocabulary(config: Config, stores: list[Store]) -> Vocabulary:
    """The run's table of ids: the stores' sizes within the model's vocabulary.

    Raises ConfigError when the stores disagree with each other, with the tokenizers that the config names, or with
    model.family, model.vocab_size or objective.sentinels.
    """
    first = stores[0]
    for i, store in enumerate(stores):
        for name in ("text_size", "codebook_size", "image_tokens"):
            found, expected = getattr(store.shape, name), getattr(first.shape, name)
            if found != expected:
                raise ConfigError(
                    f"data.mixture[{i}].store = {store.folder} has {name} {found}; "
                    f"expected {expected} as in {first.folder}"
                )
        for role in sorted({*store.inputs, *first.inputs} & {"text_tokenizer", "image_tokenizer"}):
            given = getattr(config.data, role)
            expected = read_manifest(given, role).fingerprint if given else first.inputs.get(role)
            if store.inputs.get(role) != expected:
                where = f"data.{role} = {given}" if given else first.folder
                raise ConfigError(
                    f"data.mixture[{i}].store = {store.folder} was made with {role} "
                    f"{str(store.inputs.get(role))[:12]}; expected {str(expected)[:12]}, that of {where}"
                )
    return _model_vocabulary(config, first)


def _model_vocabulary(config: Config, store: Store) -> Vocabulary:
    model, sentinels = config.model, config.objective.sentinels
    own = store.vocabulary()
    family = "chameleon" if model.family == "chameleon" else "cm3leon"
    if own.family != family:
        raise ConfigError(
            f"{store.folder} holds ids of a {own.family} vocabulary; model.family = {model.family} expects {family} ids"
        )
    if family == "chameleon":
        if own.size != model.vocab_size:
            raise ConfigError(
                f"{store.folder} has a vocabulary of {own.size}; found model.vocab_size = {model.vocab_size}"
            )
        return own
    shape = store.shape
    special = model.vocab_size - shape.text_size - shape.codebook_size
    needed = sentinels + _SPECIALS
    if special < needed:
        raise ConfigError(
            f"model.vocab_size = {model.vocab_size} leaves {special} special ids beside the {shape.text_size} text ids "
            f"and {shape.codebook_size} image codes of {store.folder}; objective.sentinels = {sentinels} needs "
            f"{needed}: model.vocab_size of at least {model.vocab_size - special + needed}"
        )
    return Vocabulary.cm3leon(shape.text_size, shape.codebook_size, special, sentinels, shape.image_tokens)


def _settings(config: Config, vocabulary: Vocabulary) -> StreamSettings:
    data, objective = config.data, config.objective
    masked = objective.kind == "cm3"
    if masked and not vocabulary.sentinels:
        raise ConfigError(
            "objective.kind = cm3 needs sentinels, which chameleon's vocabulary has not; set it to causal"
        )
    if objective.spans < 0 or data.window < 0 or data.workers < 0:
        raise ConfigError(
            f"objective.spans = {objective.spans}, data.window = {data.window}, data.workers = {data.workers}; "
            "expected none below 0"
        )
    answers = objective.loss_on == "answers"
    return StreamSettings(
        sequence_length=config.model.sequence_length,
        seed=data.seed,
        packing=data.packing,
        rotation=data.rotation,
        document_mask=data.document_mask,
        spans=objective.spans if masked else 0.0,
        whole_segment=objective.whole_segment,
        answers_only=answers,
        turns=answers or vocabulary.family == "chameleon",
    )


def _check_longest(stores: list[Store], settings: StreamSettings, vocabulary: Vocabulary) -> None:
    layout, size = Layout(vocabulary, settings.turns), settings.sequence_length + 1
    for store in stores:
        doc_id = store.longest()
        length = layout.length([tuple(store.segment_lengths(doc_id))])
        if length > size:
            raise ConfigError(
                f"the longest document of {store.folder} (number {doc_id}) makes {length} tokens; "
                f"model.sequence_length = {settings.sequence_length} holds {size} and data.packing = whole cuts "
                f"nothing; set model.sequence_length to at least {length - 1}, or data.packing = blocks"
            )


def _check_order(stores: list[Store]) -> None:
    """Refuse what would learn to answer a question before its picture is seen."""
    for store in stores:
        facts = store.settings.get("sft", {})
        for name, task in facts.get("tasks", {}).items() if facts.get("way") == "cm3leon" else ():
            if not task["chat"] and set(task["answers"]) - set(task["pictures"]) and task["pictures"]:
                raise ConfigError(
                    f"{store.folder} (--way cm3leon) answers task {name} before their pictures, to be filled in; "
                    "without masked spans they would be learned unseen: set objective.kind = cm3, "
                    "or make the store with --way image-first"
                )


def _sampler(config: Config, folder: str, store: Store) -> tuple[SamplerLike | None, dict[str, Any] | None]:
    retrieval = config.retrieval
    if not folder or retrieval.mode == "none" or retrieval.documents[0] == 1:
        return None, None
    # Only a run that retrieves loads the retrieval room, and faiss with it.
    from megacm3.retrieval.sampler import open_sampler

    shares, most = retrieval.documents, retrieval.max_score
    sampler = open_sampler(folder, store.fingerprint, len(store), shares, most, retrieval.mode)
    return sampler, {"neighbours": sampler.table.fingerprint} | dataclasses.asdict(retrieval)


def _with_stages(config: Config, sources: list[Source], vocabulary: Vocabulary, settings: StreamSettings) -> Stream:
    """The stream with the weights, caps, passes and stages of the config's mixture."""
    data = config.data
    sizes = [len(source.store) for source in sources]
    given = [stage.weights for stage in data.stages] or [[entry.weight for entry in data.mixture]]
    shares = [stage.share for stage in data.stages] or [1.0]
    if any(len(weights) != len(sizes) for weights in given):
        raise ConfigError(f"data.stages: weights {given}; expected {len(sizes)} each, one an entry of data.mixture")
    if abs(sum(shares) - 1) > 1e-6 or min(shares) <= 0:
        raise ConfigError(f"data.stages: shares {shares}; expected numbers above 0 that add up to 1")

    def stream(stages: list[Stage]) -> Stream:
        return Stream(sources, Mixture(sizes, stages, data.seed), vocabulary, settings, data.window)

    total = total_steps(config) * config.train.global_batch
    epochs = [entry.epochs for entry in data.mixture]
    stages: list[Stage] = []
    first = 0
    for share, weights in zip(shares, given, strict=True):
        weights = capped_weights(weights, sizes, data.upsample, data.downsample)
        if data.image_answers:
            weights = balanced_weights(weights, _pictures(sources), data.image_answers)
        probe = stream([Stage(0, tuple(weights))])
        windows = max(1, round(share * total / probe.stages[0].sequences))
        if any(epochs) and len(shares) == 1:
            weights = limit_epochs(weights, sizes, epochs, -(-total * probe.window // probe.stages[0].sequences))
        stages.append(Stage(first, tuple(weights)))
        first += windows * probe.window
    built = stream(stages)
    _check_epochs(built, epochs, total)
    return built


def _pictures(sources: list[Source]) -> list[float]:
    """Part of each store's documents whose answer holds a picture."""
    shares = []
    for source in sources:
        assert isinstance(source.store, Store)
        answers = source.store.answers()
        if not any(answers.values()):
            raise ConfigError(
                f"data.image_answers is set, but {source.name} marks no answers; "
                "make it with tools/pretokenize.py --sft, or set data.image_answers = 0"
            )
        shares.append(answers["image"] / sum(answers.values()))
    return shares


def _check_epochs(stream: Stream, epochs: list[float], total: int) -> None:
    passes = stream.passes(total)
    for (name, found), most in zip(passes.items(), epochs, strict=True):
        # Windows are whole, weights kept to 1/65536: a little more than the limit is no fault.
        if most and found > most * 1.02 + 0.02:
            raise ConfigError(
                f"training passes {found:.2f} times over {name}, whose data.mixture epochs allow {most}; "
                "lower its weight in data.stages, or train for fewer steps"
            )


def _check_answers(stream: Stream) -> None:
    drawn = [sample for probe in range(PROBES) for sample in stream.drawn(probe * stream.stages[0].sequences)]
    for sample in drawn:
        shape = stream.sources[sample.source].store.segment_lengths(sample.documents[-1])
        if any(mode & ANSWER for mode, _ in shape):
            return
    raise ConfigError(
        "objective.loss_on = answers, but no document of the first windows has an answer: every label would be masked; "
        "set objective.loss_on = all, or make the store from a fine-tuning set"
    )


def _report(stream: Stream) -> None:
    documents = sum(stream.mixture.sizes)
    for stage in stream.stages:
        logger.info(
            "data: %d documents, %d store(s); from sequence %d on %d sequences from every %d samples (%s)",
            documents,
            len(stream.sources),
            stage.first_sequence,
            stage.sequences,
            stage.documents,
            stream.settings.packing,
        )
