"""The config tree: one dataclass a section, never mutated. `resolve.py` fills it, `rules.py` checks it."""

from dataclasses import dataclass, field


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
    """none | selective (q/k norm, rotation and attention) | full (each block)."""


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
    image_answers: float = 0.0
    """Fine-tuning: share of the drawn answers that hold a picture; the weights are scaled to it, so that no modality
    becomes a habit (Chameleon's balance). 0 = as weighted. Not together with upsample and downsample."""
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
    parameters: str = "all"
    """What trains: all | image_rows (embedding and head of image ids) | norms | lora (see lora). The rest is frozen."""


@dataclass
class LoraConfig:
    """Low-rank adapters, with train.parameters = lora."""

    rank: int = 16
    alpha: float = 32.0
    """What the adapters add is multiplied by alpha / rank."""
    matrices: list[str] = field(default_factory=lambda: ["q", "v"])
    """Which matrices of each layer are adapted: any of q, k, v, o, gate, up, down."""


@dataclass
class CheckpointConfig:
    """When to save, what to keep, how to start."""

    every: int = 1000
    """Steps between saves; the last step is always saved. 0 = only the last."""
    keep: int = 2
    """Committed steps to keep; 0 = all."""
    background: bool = True
    """Save from copies while the training goes on; a rank keeps host memory of the size of its share for it."""
    on_failure: str = "stop"
    """stop | continue: what a save that fails (no space, no right to write) does to the run; the last step's stops, and
    that after a signal."""
    override: list[str] = field(default_factory=list)
    """Keys of learning rate, schedule or data weights that may differ from the checkpoint's: [optimizer.lr]."""
    resume: str = "auto"
    """required | auto | never. auto continues from the newest valid step, and says so when there is none; never sets
    the steps that are there aside (renamed)."""
    step: int = 0
    """Go back to this step, and to no other in its place; later ones are set aside (renamed). The same command again
    goes on from where the run came to since. 0 = the newest."""
    init: str = ""
    """Weights to begin with at step 0: a run, one of its steps, or a Hugging Face folder. Resuming goes before it."""


@dataclass
class EvaluationConfig:
    """Loss by modality and bits per pixel on held-out documents, while training."""

    store: str = ""
    """A token store that is not trained on; empty = off."""
    every: int = 1000
    """Steps between measurements; also after the last step."""
    documents: int = 256
    """The store's first so many."""


@dataclass
class GuardsConfig:
    """What is done about a step whose numbers go wrong; a refused step changes no parameter on any rank."""

    nonfinite: str = "skip"
    """skip | stop | rollback (to the last checkpoint, then without the batch): a loss or gradient is not finite."""
    spike: float = 20.0
    """A step is refused when its loss lies this many robust deviations (median, MAD) above the last ones. 0 = never."""
    window: int = 100
    """Steps that the median, and the count of refused steps, look back over."""
    limit: int = 5
    """Refused steps in a window that a run survives; one more ends it with exit code 5."""
    output_norm: float = 2.0
    """Warn when the output norm grows to so many times its lowest median of a window after the warm-up. 0 = never."""
    skip_steps: list[list[int]] = field(default_factory=list)
    """Ranges [first, end) of steps (1 = the first) whose batch is read but not trained on."""
    skip_sequences: list[list[int]] = field(default_factory=list)
    """Ranges [first, end) of sequences of the stream that no step reads."""


@dataclass
class WatchdogConfig:
    """When a slow rank is named, and when it ends the job."""

    warn: float = 120.0
    """Seconds in one phase of a step, while others wait, before a warning names rank and phase. 0 = never."""
    timeout: float = 1800.0
    """Seconds in one phase, or of silence, before all ranks write their stacks and leave with code 6. 0 = never."""


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
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    log: LogConfig = field(default_factory=LogConfig)


CHOICES = {
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
    "train.parameters": ("all", "image_rows", "norms", "lora"),
    "checkpoint.resume": ("required", "auto", "never"),
    "guards.nonfinite": ("skip", "stop", "rollback"),
    "checkpoint.on_failure": ("stop", "continue"),
}

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
"""Of a layer, as lora.matrices names them."""


def total_steps(config: Config) -> int:
    """Optimizer steps of the whole schedule, from train.steps or train.tokens."""
    if config.train.steps:
        return config.train.steps
    return -(-config.train.tokens // (config.train.global_batch * config.model.sequence_length))
