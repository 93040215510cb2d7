"""The config tree: one dataclass a section, read from YAML and dotted overrides, strict about keys, never mutated.

Order of precedence: defaults below < the preset < the YAML file < `key=value` overrides. What is resolved is saved as
`config.yaml` in the run's folder.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megacm3.errors import ConfigError


@dataclass
class ModelConfig:
    """The shape of the network. A preset fills all of it; any field can be overridden."""

    preset: str = ""
    """Name of a preset (megacm3/presets.py); empty = every field below is given by hand."""
    family: str = "cm3leon"
    """cm3leon | chameleon | modern: the vocabulary's layout, the documents' layout and the export class."""
    layers: int = 2
    hidden_size: int = 64
    heads: int = 4
    kv_heads: int = 4
    """Key and value heads; fewer than `heads` = grouped-query attention. Never fewer than parallel.tensor."""
    ffn_size: int = 256
    vocab_size: int = 65536
    """Ids of the vocabulary: text + image codes + special."""
    vocab_rows: int = 0
    """Rows of the embedding table, 0 = vocab_size. Rows past vocab_size are padding: never predicted, never counted."""
    sequence_length: int = 4096
    norm: str = "layernorm"
    """layernorm (parameter-free) | rmsnorm (with weight)."""
    norm_eps: float = 1e-5
    norm_order: str = "pre"
    """pre (x + f(norm(x))) | swin (x + norm(f(x)), Chameleon 34B)."""
    activation: str = "relu"
    """relu | swiglu."""
    positions: str = "learned"
    """learned | rope."""
    rope_theta: float = 10000.0
    qk_norm: str = "none"
    """none | layernorm (weight and bias) | rmsnorm (weight): over each head of q and k, before RoPE."""
    qk_norm_groups: int = 1
    """Rows of each q/k norm: heads // groups consecutive heads share a row. 1, or any divisor of heads and kv_heads."""
    tied: bool = True
    """One table for embedding and head."""
    dropout: float = 0.0
    """On the output of attention and of the feed-forward, before the residual sum."""
    init: str = "truncated"
    """truncated (normal, cut at 3 std) | normal."""
    init_std: float = 0.006
    init_positions_std: float = 0.0002
    init_residual: str = "zero"
    """zero | scaled (std / sqrt(2 layers)): the two matrices of a layer that write into the residual stream."""


@dataclass
class ParallelConfig:
    """How the network is cut."""

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    """Sequence parallel: norms and dropout on 1/tensor of the positions. Needs tensor > 1."""
    recompute: str = "none"
    """none | selective (attention only) | full (each block)."""


@dataclass
class MixtureEntry:
    """One token store of the mixture."""

    store: str = ""
    weight: float = 1.0
    """Share of the documents drawn, relative to the other entries."""
    neighbours: str = ""
    """Neighbour folder of this store; empty = no retrieved documents from it."""
    epochs: float = 0.0
    """Most passes over the store in the whole training; its weight is lowered to keep to it. 0 = no limit."""


@dataclass
class StageConfig:
    """A part of the training with its own weights of the mixture."""

    share: float = 1.0
    """Part of the training, by tokens; the shares of all stages add up to 1."""
    weights: list[float] = field(default_factory=list)
    """Weight of each entry of data.mixture, in their order, in place of the entries' own."""


@dataclass
class DataConfig:
    """Where samples come from and how they are packed."""

    mixture: list[MixtureEntry] = field(default_factory=list)
    stages: list[StageConfig] = field(default_factory=list)
    """One after another, such as Chameleon's 0.8 and 0.2; empty = one stage with the entries' weights."""
    upsample: float = 0.0
    """A store's share is at most so many times its part of all documents (CM3Leon's fine-tuning: 3). 0 = no bound."""
    downsample: float = 0.0
    """A store's share is at least this times its part of all documents (CM3Leon's fine-tuning: 0.3). 0 = no bound."""
    packing: str = "blocks"
    """blocks (samples one after another, cut at every sequence) | whole (samples and images are never cut)."""
    seed: int = 0
    rotation: float = 0.0
    """Probability that the picture stands before the text (0.5 for chameleon)."""
    document_mask: bool = False
    """Attention does not cross samples; the CM3 rearrangement runs per sample."""
    position_reset: bool = False
    """Positions start again at each sample. Needs document_mask."""
    window: int = 0
    """Documents in a window of the stream; 0 = chosen from the sequence length."""
    workers: int = 1
    """Loader processes a rank; 0 = in the training process. The stream does not depend on it."""
    text_tokenizer: str = ""
    """Folder; checked against the store's, copied into exports."""
    image_tokenizer: str = ""
    """Folder; checked against the store's, copied into exports."""


@dataclass
class ObjectiveConfig:
    """What is predicted."""

    kind: str = "cm3"
    """cm3 | causal."""
    spans: float = 1.0
    """Mean of the Poisson number of masked spans a sequence."""
    whole_segment: float = 0.5
    """Probability that spans are whole segments."""
    sentinels: int = 512
    loss_on: str = "all"
    """all | answers."""
    z_loss: float = 0.0
    """Factor of the mean of (log Z)^2 over the targets."""


@dataclass
class RetrievalConfig:
    """Which retrieved documents stand before a sample."""

    documents: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 1.0])
    """Probabilities of 0, 1, 2 and 3 retrieved documents."""
    max_score: float = 0.9
    """Candidates with a higher inner product are left out."""
    mode: str = "neighbours"
    """neighbours | random | none: the last two are controls."""


@dataclass
class ScheduleConfig:
    """The learning rate as a function of the step alone."""

    kind: str = "linear"
    """linear | cosine | exponential | constant: the decay after the warm-up, over train.steps."""
    warmup: int = 0
    """Steps of linear warm-up."""
    final: float = 0.1
    """Last learning rate as a share of the peak."""


@dataclass
class OptimizerConfig:
    """AdamW, or SGD for comparing layouts."""

    kind: str = "adamw"
    """adamw | sgd."""
    lr: float = 3e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    """Global gradient norm; 0 = no clipping."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class TrainConfig:
    """How long, how much at once, where to."""

    steps: int = 0
    """Steps of the whole schedule. Give either steps or tokens."""
    tokens: int = 0
    """The same in tokens (global_batch x sequence_length a step, rounded up)."""
    stop_at: int = 0
    """Save and leave after this step, before the schedule ends; 0 = run to the end."""
    micro_batch: int = 1
    """Sequences of one forward pass on one rank."""
    global_batch: int = 1
    """Sequences of one optimizer step over all ranks."""
    dtype: str = "bf16"
    """fp32 | bf16 (with fp32 master weights)."""
    device: str = "auto"
    """auto | cpu | cuda."""
    seed: int = 0
    out: str = ""
    """Folder of the run."""


@dataclass
class CheckpointConfig:
    """When to save, what to keep, how to start."""

    every: int = 1000
    """Steps between saves; the last step is always saved. 0 = only the last."""
    keep: int = 2
    """Committed steps to keep; 0 = all."""
    resume: str = "auto"
    """required | auto | never. auto continues from the newest valid step, and says so when there is none."""


@dataclass
class LogConfig:
    """What is written while training."""

    every: int = 10
    tensorboard: bool = True
    wandb: str = ""
    """Project name; empty = off."""
    replicas_every: int = 1000
    """Steps between checks that replicated parameters are bit-equal over the tensor ranks; also before each save."""


@dataclass
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    deepspeed: str = ""
    """Path of a ds_configs/*.json; empty = ds_configs/zero1.json."""
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


_CHOICES = {
    "model.family": ("cm3leon", "chameleon", "modern"),
    "model.norm": ("layernorm", "rmsnorm"),
    "model.norm_order": ("pre", "swin"),
    "model.activation": ("relu", "swiglu"),
    "model.positions": ("learned", "rope"),
    "model.qk_norm": ("none", "layernorm", "rmsnorm"),
    "model.init": ("truncated", "normal"),
    "model.init_residual": ("zero", "scaled"),
    "parallel.recompute": ("none", "selective", "full"),
    "data.packing": ("blocks", "whole"),
    "objective.kind": ("cm3", "causal"),
    "objective.loss_on": ("all", "answers"),
    "retrieval.mode": ("neighbours", "random", "none"),
    "optimizer.kind": ("adamw", "sgd"),
    "optimizer.schedule.kind": ("linear", "cosine", "exponential", "constant"),
    "train.dtype": ("fp32", "bf16"),
    "train.device": ("auto", "cpu", "cuda"),
    "checkpoint.resume": ("required", "auto", "never"),
}


def field_names(schema: type, prefix: str = "") -> list[str]:
    """Dotted names of every leaf key below a config dataclass."""
    names = []
    for item in dataclasses.fields(schema):
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            names += field_names(item.type, f"{prefix}{item.name}.")
        else:
            names.append(f"{prefix}{item.name}")
    return names


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix[:-1]: tree} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.")
    return flat


def check_keys(flat: dict[str, Any], schema: type, source: str) -> None:
    """Raise ConfigError for a key that `schema` does not have, naming the nearest one that it has."""
    known = field_names(schema)
    for key in flat:
        parts = key.split(".")
        if any(".".join(parts[:depth]) in known for depth in range(1, len(parts) + 1)):
            continue
        if any(name.startswith(key + ".") for name in known) and not flat[key]:
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
        near = near or [name for name in known if name.split(".")[-1] == parts[-1]]
        hint = (
            f"; did you mean '{near[0]}'?"
            if near
            else f"; sections are {', '.join(sorted({k.split('.')[0] for k in known}))}"
        )
        raise ConfigError(f"{source}: unknown key '{key}'{hint}")


def merge(schema: type, layers: list[tuple[str, dict[str, Any]]]) -> Any:
    """An instance of the dataclass `schema` from nested or dotted dicts, later ones over earlier ones.

    layers: (where it came from, values). Raises ConfigError for unknown keys and wrong types.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = OmegaConf.structured(schema)
    for source, values in layers:
        flat = _flatten(values)
        check_keys(flat, schema, source)
        for key, value in flat.items():
            try:
                OmegaConf.update(tree, key, value, force_add=False)
            except (OmegaConfBaseException, IndexError) as fault:
                raise ConfigError(f"{source}: {key} = {value!r}: {str(fault).splitlines()[0]}") from fault
    try:
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as fault:
        raise ConfigError(str(fault).splitlines()[0]) from fault


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError when it is missing, not YAML or not a mapping."""
    import yaml

    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as fault:
        raise ConfigError(f"config {path} does not exist") from fault
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        raise ConfigError(f"config {path} is not YAML: {str(fault).splitlines()[0]}") from fault
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path} holds a {type(tree).__name__}; expected sections such as 'model:'")
    return tree


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """`["train.steps=10"]` -> `{"train.steps": 10}`, values read as YAML. Raises ConfigError for anything else."""
    import yaml

    flat = {}
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"argument '{text}' is not key=value (for example train.steps=100)")
        try:
            flat[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as fault:
            raise ConfigError(f"override '{text}': the value is not YAML") from fault
        if isinstance(flat[key.strip()], str):
            flat[key.strip()] = _number(flat[key.strip()])
    return flat


def _number(text: str) -> str | float:
    # YAML 1.1 reads 1e-4 as a string; a learning rate is meant.
    try:
        return float(text)
    except ValueError:
        return text


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """The resolved config of a YAML file and dotted overrides. Raises ConfigError."""
    from megacm3.presets import preset

    given = read_yaml(path) if path else {}
    flat = parse_overrides(overrides or [])
    name = flat.get("model.preset", (given.get("model") or {}).get("preset", ""))
    layers = [(f"preset {name}", preset(name))] if name else []
    layers += [(str(path), given), ("command line", flat)]
    config = merge(Config, _one_length(layers))
    check(config)
    return config


def _one_length(layers: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    # A later train.steps replaces an earlier train.tokens, and the other way round; both in one place is an error.
    flats = [(source, _flatten(values)) for source, values in layers]
    for index, (_, flat) in enumerate(flats):
        for key, other in (("train.steps", "train.tokens"), ("train.tokens", "train.steps")):
            if flat.get(key):
                for _, earlier in flats[:index]:
                    earlier.pop(other, None)
    return flats


def save_config(config: Config, path: str | Path, extra: dict[str, Any] | None = None) -> None:
    """Write the resolved config as YAML, with `extra` (such as library versions) under `resolved_with`."""
    import yaml

    from megacm3.files import new_file

    tree = dataclasses.asdict(config)
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    for key, value in (extra or {}).items():
        text += f"# {key}: {value}\n"
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def total_steps(config: Config) -> int:
    """Optimizer steps of the whole schedule, from train.steps or train.tokens."""
    if config.train.steps:
        return config.train.steps
    return -(-config.train.tokens // (config.train.global_batch * config.model.sequence_length))


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def check(config: Config) -> None:
    """Rules that need no world size. Raises ConfigError with the value, the rule and the nearest legal value."""
    for key, choices in _CHOICES.items():
        if _get(config, key) not in choices:
            near = difflib.get_close_matches(str(_get(config, key)), choices, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"{key} = '{_get(config, key)}'; expected one of {', '.join(choices)}{hint}")
    _check_model(config)
    _check_rest(config)


def _nearest(value: int, multiple: int) -> str:
    below, above = value // multiple * multiple, -(-value // multiple) * multiple
    return f"{below} or {above}" if below else str(above)


def _divides(key: str, value: int, by_key: str, by: int) -> None:
    if value % by:
        raise ConfigError(f"{key} = {value} is not divisible by {by_key} = {by}; nearest: {_nearest(value, by)}")


def _check_model(config: Config) -> None:
    model, parallel = config.model, config.parallel
    for name in ("layers", "hidden_size", "heads", "kv_heads", "ffn_size", "vocab_size", "sequence_length"):
        if getattr(model, name) < 1:
            raise ConfigError(f"model.{name} = {getattr(model, name)}; expected at least 1")
    for name in ("tensor", "pipeline"):
        if getattr(parallel, name) < 1:
            raise ConfigError(f"parallel.{name} = {getattr(parallel, name)}; expected at least 1")
    _divides("model.hidden_size", model.hidden_size, "model.heads", model.heads)
    _divides("model.heads", model.heads, "model.kv_heads", model.kv_heads)
    if model.kv_heads < parallel.tensor:
        raise ConfigError(
            f"parallel.tensor = {parallel.tensor} is more than model.kv_heads = {model.kv_heads}; "
            f"each tensor rank needs whole key/value heads: at most parallel.tensor = {model.kv_heads}"
        )
    _divides("model.heads", model.heads, "parallel.tensor", parallel.tensor)
    _divides("model.kv_heads", model.kv_heads, "parallel.tensor", parallel.tensor)
    _divides("model.ffn_size", model.ffn_size, "parallel.tensor", parallel.tensor)
    _divides("model.layers", model.layers, "parallel.pipeline", parallel.pipeline)
    rows = model.vocab_rows or model.vocab_size
    if rows < model.vocab_size:
        raise ConfigError(f"model.vocab_rows = {rows} is less than model.vocab_size = {model.vocab_size}")
    _divides("model.vocab_rows" if model.vocab_rows else "model.vocab_size", rows, "parallel.tensor", parallel.tensor)
    if rows - model.vocab_size >= rows // parallel.tensor:
        nearest = -(-model.vocab_size // parallel.tensor) * parallel.tensor
        raise ConfigError(
            f"model.vocab_rows = {rows} leaves the last of parallel.tensor = {parallel.tensor} ranks without any of "
            f"model.vocab_size = {model.vocab_size} ids; nearest: {nearest}"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError("parallel.sequence = true needs parallel.tensor > 1; found parallel.tensor = 1")
    if parallel.sequence:
        _divides("model.sequence_length", model.sequence_length, "parallel.tensor", parallel.tensor)
    if model.qk_norm != "none":
        _divides("model.heads", model.heads, "model.qk_norm_groups", model.qk_norm_groups)
        groups = min(model.qk_norm_groups, model.kv_heads)
        _divides("model.kv_heads", model.kv_heads, "model.qk_norm_groups", groups)
    if model.positions == "rope" and model.hidden_size // model.heads % 2:
        raise ConfigError(f"model.positions = rope needs an even head size; found {model.hidden_size // model.heads}")


def _check_rest(config: Config) -> None:
    train, data = config.train, config.data
    if (train.steps > 0) == (train.tokens > 0):
        raise ConfigError(f"give either train.steps or train.tokens; found {train.steps} and {train.tokens}")
    for key in ("train.micro_batch", "train.global_batch", "log.every", "objective.sentinels"):
        if _get(config, key) < 1:
            raise ConfigError(f"{key} = {_get(config, key)}; expected at least 1")
    shares = config.retrieval.documents
    if len(shares) != 4 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(
            f"retrieval.documents = {shares}; expected four probabilities (of 0, 1, 2, 3 documents) that add up to 1"
        )
    for key in ("data.rotation", "objective.whole_segment", "model.dropout", "optimizer.schedule.final"):
        if not 0 <= _get(config, key) <= 1:
            raise ConfigError(f"{key} = {_get(config, key)}; expected a share from 0 to 1")
    if config.model.dropout == 1:
        raise ConfigError("model.dropout = 1 drops everything; expected less than 1")
    if data.position_reset and not data.document_mask:
        raise ConfigError("data.position_reset = true needs data.document_mask = true")
    if len(config.optimizer.betas) != 2:
        raise ConfigError(f"optimizer.betas = {config.optimizer.betas}; expected two numbers")
