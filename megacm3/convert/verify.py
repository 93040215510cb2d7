"""The gate of every conversion: the trainer's layers and the Hugging Face class must give the same logits, in fp32.

Both sides run layer by layer, each layer's weights read when it runs and dropped after, so that memory does not
grow with the model.
"""

import dataclasses
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megacm3.checkpoint.boxes import Box
from megacm3.checkpoint.merged import Merged
from megacm3.checkpoint.pieces import PARAM
from megacm3.checkpoint.reader import Checkpoint
from megacm3.config import Config
from megacm3.convert.configs import CLASSES
from megacm3.convert.folder import HfFolder, Source
from megacm3.convert.meta import MetaFolder, meta_logits
from megacm3.errors import CheckpointError, Megacm3Error
from megacm3.parallel.cpu import prepare

log = logging.getLogger(__name__)
TOLERANCE = 1e-5
"""Largest difference of a logit over the largest logit, in fp32: rounding of two orders of the same sums."""
LOADED_WHOLE = 2_000_000_000
"""Bytes of weights up to which transformers' own `from_pretrained` is run as well, and its report read."""


@dataclass(frozen=True)
class Verdict:
    """What the gate found."""

    largest: float
    """Largest relative difference of a logit."""
    tokens: int
    """Tokens compared."""
    batches: tuple[str, ...]
    """What they were: random, real."""


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone, for layers that expect one; nothing is left of it afterwards."""
    if dist.is_initialized():
        assert dist.get_world_size() == 1, "the gate runs in one process"
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def random_batch(vocab_size: int, length: int) -> torch.Tensor:
    """int64 [2, length], the same every time."""
    return torch.randint(0, vocab_size, (2, length), generator=torch.Generator().manual_seed(7))


def real_batch(config: Config, state: dict[str, Any], length: int) -> torch.Tensor | None:
    """int64 [1, length]: the first documents of the run's first store; None where store or vocabulary is not there."""
    from megacm3.data.store import Store
    from megacm3.tokenizers.vocabulary import Vocabulary

    folder = config.data.mixture[0].store if config.data.mixture else ""
    if not folder or not Path(folder).is_dir() or not state.get("vocabulary"):
        return None
    try:
        store, vocabulary = Store.open(folder), Vocabulary.from_json(state["vocabulary"])
        ids: list[np.ndarray] = []
        for doc_id in range(len(store)):
            for segment in store.document(doc_id).segments:
                ids.append(vocabulary.image_ids(segment.tokens) if segment.kind else segment.tokens)
            if sum(map(len, ids)) >= length:
                break
    except Megacm3Error as fault:
        log.warning("no real tokens for the gate: %s", fault)
        return None
    tokens = np.concatenate(ids)[:length]
    return torch.from_numpy(tokens.astype(np.int64))[None] if len(tokens) else None


@torch.no_grad()
def trainer_logits(
    checkpoint: Checkpoint,
    config: Config,
    batches: list[torch.Tensor],
    kind: str = PARAM,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """fp32 logits [B, T, vocab_size] of the trainer's layers for int64 [B, T] batches.

    kind: which of the checkpoint's values. dtype: they are rounded to it first, as an export rounds them.
    """
    prepare(torch.device("cpu"))
    from megacm3.model.block import Block, pack
    from megacm3.model.layers import linear_config
    from megacm3.model.loss import LossState
    from megacm3.model.stages import Head, Positions, Words
    from megacm3.parallel.context import build_context
    from megacm3.parallel.parts import named_parts

    # Adapters run as such, unless they were merged before rounding.
    apart = isinstance(checkpoint, Merged) and dtype == torch.float32
    checkpoint = Checkpoint(checkpoint.folder) if apart else checkpoint
    trained = "lora" if apart else "all"
    plain = dataclasses.replace(config.train, dtype="fp32", device="cpu", parameters=trained)
    cut = dataclasses.replace(config.parallel, tensor=1, pipeline=1, sequence=False, recompute="none")
    config = dataclasses.replace(config, train=plain, parallel=cut)

    def filled(module: torch.nn.Module) -> Any:
        for parameter, part in named_parts(module):
            rows = parameter.data[part.start : part.start + part.shape[0]]
            checkpoint.read(kind, part.name, Box(part.offset, part.shape), rows)
            rows.copy_(rows.to(dtype))
        return module.eval()

    with one_process():
        context = build_context(config, torch.device("cpu"))
        linear = linear_config(config, context, torch.float32)
        kinds = torch.zeros(config.model.vocab_size, dtype=torch.uint8)
        words = filled(Words(config, context, linear, kinds))
        meta = [pack(torch.zeros(len(b)), torch.zeros_like(b), torch.full_like(b, -100)) for b in batches]
        hidden = [words((b, m)) for b, m in zip(batches, meta, strict=True)]
        table = words.weight if config.model.tied else torch.empty(0)
        del words
        for i in range(-1, config.model.layers):
            layer = filled(Block(i, config, context, linear) if i >= 0 else Positions(config, context, linear))
            hidden = [layer(x) for x in hidden]
        head = filled(Head(config, context, linear, kinds, LossState()))
        return [head.logits((*x, table))[..., : config.model.vocab_size] for x in hidden]


@torch.no_grad()
def hf_logits(folder: Path, batches: list[torch.Tensor], layers: int = 0) -> list[torch.Tensor]:
    """fp32 logits [B, T, vocab_size] of the folder's own class in transformers; layers: of the first ones alone.

    Raises CheckpointError when the class needs tensors that the folder lacks, or has no place for some that it holds.
    """
    model, source = _empty_model(folder, layers), HfFolder(folder)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    wanted = set(model.state_dict().keys())
    missing = sorted(wanted - source.tensors.keys() - tied.keys())
    unexpected = sorted(name for name in source.tensors.keys() - wanted if not _beyond(name, layers))
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"has no place for {unexpected[0]}"
        raise CheckpointError(f"{folder}: transformers' {type(model).__name__} {what}")

    def read(name: str) -> torch.Tensor:
        return source.tensor(name if name in source.tensors else tied[name]).float()

    for name, module in model.named_modules():
        _stream(module, name, read)
    return [model(input_ids=batch, use_cache=False).logits.float() for batch in batches]


def _class(config: Any) -> Any:
    """The class that a config names, or the one of the table where it names a fork's."""
    import transformers

    return getattr(transformers, (config.architectures or [""])[0], None) or getattr(
        transformers, CLASSES[config.model_type]
    )


def _beyond(name: str, layers: int) -> bool:
    """Whether a tensor belongs to a layer that was cut away; nothing is where `layers` is 0."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return bool(layers and found and int(found[1]) >= layers)


def _empty_model(folder: Path, layers: int = 0) -> Any:
    import transformers
    from accelerate import init_empty_weights

    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    config.num_hidden_layers = layers or config.num_hidden_layers
    with init_empty_weights(include_buffers=False):
        model = _class(config)(config)
    model.eval().float()
    mapping = getattr(model.model, "vocabulary_mapping", None)
    if mapping is not None:
        _ = mapping.bpe2img
        mapping.image_tokens = []  # the class hides the logits of image ids; here they are compared too
    return model


def _stream(module: torch.nn.Module, prefix: str, read: Callable[[str], torch.Tensor]) -> None:
    """Let a module have its own parameters only while it runs."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    if not names:
        return
    empty = {name: module._parameters[name] for name in names}

    def fill(*_: Any) -> None:
        for name in names:
            module._parameters[name] = torch.nn.Parameter(read(f"{prefix}.{name}"), requires_grad=False)

    def drop(*_: Any) -> None:
        module._parameters.update(empty)

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(drop)


def check_loading(folder: Path) -> None:
    """Load the folder with transformers itself. Raises CheckpointError for keys that it misses or does not expect."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    _, info = _class(config).from_pretrained(folder, local_files_only=True, output_loading_info=True)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            raise CheckpointError(f"{folder}: transformers reports {what.replace('_', ' ')}: {sorted(info[what])[:4]}")


def compare(
    checkpoint: Checkpoint,
    config: Config,
    folder: Path,
    source: Source | None = None,
    kind: str = PARAM,
    dtype: torch.dtype = torch.float32,
    tolerance: float = TOLERANCE,
    layers: int = 0,
) -> Verdict:
    """Run both sides on random and, where the run's store is there, real tokens. kind, dtype: as in `trainer_logits`.

    source: the folder's own form of the model, where it is not of transformers'. layers: only the first ones of both
    sides (0 = all), which a benchmark of a large model has time for.

    Raises CheckpointError when a logit differs by more than `tolerance` of the largest one, or is not finite.
    """
    length = min(config.model.sequence_length, 128)
    # A source has fewer ids where --extend-vocab added some.
    ids = source.config["vocab_size"] if source is not None else HfFolder(folder).config["vocab_size"]
    batches = [random_batch(ids, length)]
    real = real_batch(config, checkpoint.state, length)
    batches += [] if real is None else [real]
    cut = dataclasses.replace(config, model=dataclasses.replace(config.model, layers=layers or config.model.layers))
    ours = trainer_logits(checkpoint, cut, batches, kind, dtype)
    theirs = meta_logits(source, batches) if isinstance(source, MetaFolder) else hf_logits(folder, batches, layers)
    largest = 0.0
    for a, b in zip((logits[..., :ids] for logits in ours), theirs, strict=True):
        top = float(a.abs().max())
        relative = float((a - b).abs().max()) / top if top else float(b.abs().max())
        largest = relative if not relative <= largest else largest  # a NaN stays
    if not largest <= tolerance:
        raise CheckpointError(
            f"the logits of {folder} differ from the trainer's by {largest:.2e} of the largest; "
            f"at most {tolerance:.0e} is rounding. Nothing was written"
        )
    if (
        not isinstance(source, MetaFolder)
        and sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= LOADED_WHOLE
    ):
        check_loading(folder)
    tokens = sum(batch.numel() for batch in batches)
    return Verdict(largest, tokens, ("random",) if real is None else ("random", "real"))
