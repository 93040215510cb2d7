"""The settings of image tokenizer training, as read from `--config`."""

from dataclasses import dataclass, field
from pathlib import Path

from megacm3.errors import ConfigError


@dataclass
class NetworkConfig:
    """The `diffusers.VQModel`."""

    image_size: int = 256
    """Side of a picture in pixels."""
    channels: list[int] = field(default_factory=lambda: [128, 128, 256, 512])
    """Channels of each resolution, highest first; each one after the first halves the side."""
    layers_per_block: int = 2
    """Residual blocks at each resolution of the encoder (the decoder has one more)."""
    attention_levels: list[int] = field(default_factory=list)
    """Resolutions with attention, 0 the highest."""
    middle_attention: bool = True
    """Attention in the middle block."""
    latent_channels: int = 256
    """Channels before quant_conv and after post_quant_conv."""
    codebook_size: int = 8192
    """Number of codes."""
    code_dim: int = 256
    """Length of a codebook entry."""
    norm_groups: int = 32
    """Groups of the group norms."""


@dataclass
class QuantizerConfig:
    """How the codebook is learned (vector-quantize-pytorch)."""

    decay: float = 0.99
    """Decay of the moving averages that the codebook entries are."""
    commitment: float = 0.25
    """Weight of the commitment loss (0.25 in taming-transformers)."""
    dead_below: float = 0.05
    """A code used less than this share of an equal use (moving average) is replaced by a latent of the batch."""
    start: int = 0
    """Steps of plain auto-encoding before the codebook is set by k-means on the latents."""
    kmeans: int = 10
    """Iterations of k-means at the start; 0 starts from random vectors."""
    cosine: bool = False
    """Compare directions instead of distances; the entries written to the network then have unit length."""
    rotation_trick: bool = False
    """Pass gradients through the codebook by a rotation (arXiv 2410.06424) instead of straight through."""


@dataclass
class LossConfig:
    """Weights of the losses."""

    l1: float = 1.0
    """Mean absolute difference, pixels in [-1, 1]."""
    l2: float = 0.0
    """Mean squared difference."""
    perceptual: float = 0.0
    """Distance of features; needs perceptual_path."""
    perceptual_path: str = ""
    """Local weights of the feature network: a transformers vision model's folder, or torchvision's VGG16 as .pth."""
    adversarial: float = 0.0
    """Hinge loss of a PatchGAN, scaled to the reconstruction's gradient at the last layer (0.8 in taming)."""
    adversarial_start: int = 10_000
    """Step from which the adversarial loss counts."""
    regions: float = 0.0
    """Further weight on pixels inside a picture's regions (faces, objects), times the region's own weight."""


@dataclass
class TrainConfig:
    """The run."""

    steps: int = 100_000
    """Optimizer steps."""
    seconds: float = 0.0
    """Wall-clock budget: the schedule ends at steps or here, whatever comes first; 0 for none."""
    batch: int = 32
    """Pictures a step, over all ranks."""
    lr: float = 1e-4
    """Peak learning rate."""
    warmup: int = 100
    """Steps of linear warm-up."""
    final_lr: float = 0.05
    """Learning rate at the end, as a share of the peak (cosine in between)."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Adam's betas."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    clip: float = 1.0
    """Gradient norm limit; 0 for none."""
    seed: int = 0
    """Key of every random choice."""
    save_every: int = 1000
    """Steps between saves of the state that a later run continues from."""
    max_pictures: int = 0
    """Pictures prepared at most; 0 for all."""
    evaluate: int = 1000
    """Pictures in the report's figures at most."""
    device: str = "cpu"
    """cpu or cuda; under torchrun each rank takes its own GPU."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""


@dataclass
class ImageTokenizerConfig:
    """All of it."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    """The `diffusers.VQModel`."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    """How the codebook is learned."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the losses."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The run."""


def load_image_config(path: str | Path | None, overrides: list[str] | None = None) -> ImageTokenizerConfig:
    """The settings of a YAML file and dotted `key=value` overrides. Raises ConfigError."""
    from megacm3.resolve import merge, parse_overrides, read_yaml

    layers = [(str(path), read_yaml(path))] if path else []
    layers.append(("command line", parse_overrides(overrides or [])))
    config: ImageTokenizerConfig = merge(ImageTokenizerConfig, layers)
    _check(config)
    return config


def _check(config: ImageTokenizerConfig) -> None:
    network, train, loss = config.network, config.train, config.loss
    if not network.channels or min(network.channels) < 1:
        raise ConfigError(f"network.channels = {network.channels}; expected one positive number a resolution")
    factor = 2 ** (len(network.channels) - 1)
    if network.image_size % factor or network.image_size < factor:
        below = max(1, network.image_size // factor) * factor
        raise ConfigError(
            f"network.image_size = {network.image_size} is not divisible by {factor} "
            f"({len(network.channels)} resolutions); nearest: {below} or {below + factor}"
        )
    for channels in network.channels:
        if channels % network.norm_groups:
            raise ConfigError(f"network.channels has {channels}, not divisible by norm_groups = {network.norm_groups}")
    if any(not 0 <= level < len(network.channels) for level in network.attention_levels):
        raise ConfigError(
            f"network.attention_levels = {network.attention_levels}; expected 0..{len(network.channels) - 1}"
        )
    if network.codebook_size < 2 or network.code_dim < 1:
        raise ConfigError("network.codebook_size must be at least 2 and network.code_dim at least 1")
    if train.steps < 1 or train.batch < 1 or train.lr <= 0:
        raise ConfigError("train.steps and train.batch must be at least 1, train.lr above 0")
    if len(train.betas) != 2:
        raise ConfigError(f"train.betas = {train.betas}; expected two numbers")
    if loss.adversarial > 0 and network.image_size < 32:
        raise ConfigError(
            f"loss.adversarial needs pictures of 32 pixels or more; network.image_size = {network.image_size}"
        )
    if loss.perceptual > 0 and not loss.perceptual_path:
        raise ConfigError("loss.perceptual > 0 needs loss.perceptual_path, a local folder or file of weights")
    if loss.perceptual_path and not Path(loss.perceptual_path).exists():
        raise ConfigError(f"loss.perceptual_path = {loss.perceptual_path} does not exist")
