"""An exported Hugging Face folder in the decoder's form: shapes checked, projections fused, no transformers needed.

Families: OPT (cm3leon), Llama and Qwen3 (modern), Chameleon. Keys and shapes are those that transformers 5 writes.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megacm3.errors import CheckpointError
from megacm3.files import read_json
from megacm3.inference.linear import Weight

SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")


@dataclass(frozen=True)
class Architecture:
    """What the decoder must know of a model, read from `config.json`."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    """Rows of the embedding; padding rows above the vocabulary's size are never sampled."""
    positions: int
    """The longest sequence."""
    norm: str
    """layernorm (without parameters) or rmsnorm."""
    norm_eps: float
    activation: str
    """relu, gelu (up and down), or swiglu (gate, up and down)."""
    rope_theta: float | None
    """Base of the rotary embedding; None means a learned table of positions."""
    qk_norm: str
    """none, rmsnorm (one vector for all heads) or layernorm (weight and bias of each head)."""
    swin: bool
    """Norms on the sublayers' outputs in place of their inputs."""


@dataclass
class Layer:
    """One block's tensors; A query heads, K key/value heads, d head size, H hidden, F feed-forward."""

    qkv: Weight
    """[(A + 2K) d, H]"""
    out: Weight
    """[H, A d]"""
    up: Weight
    """[F, H], or [2F, H] with the gate's rows first."""
    down: Weight
    """[H, F]"""
    attn_norm: torch.Tensor | None
    mlp_norm: torch.Tensor | None
    q_norm: tuple[torch.Tensor, torch.Tensor | None] | None
    """weight and bias, [d] or [A, d]."""
    k_norm: tuple[torch.Tensor, torch.Tensor | None] | None


@dataclass
class Weights:
    """A whole model's tensors; V rows of the vocabulary, S positions."""

    embed: torch.Tensor
    """[V, H]"""
    positions: torch.Tensor | None
    """[S, H]: without the two offset rows of an OPT table."""
    layers: list[Layer]
    final_norm: torch.Tensor | None
    head: torch.Tensor
    """[V, H]; `embed` itself when tied."""


def read_folder(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Architecture, Weights]:
    """Read `config.json` and the safetensors of `folder`.

    Raises CheckpointError for a missing folder or file, a model class that the decoder does not run, a missing tensor
    or a wrong shape.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist; --model expects a Hugging Face folder (convert_checkpoint.py)")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; --model expects a Hugging Face folder")
    config = read_json(folder / "config.json", error=CheckpointError)
    try:
        architecture = _architecture(config, folder)
    except KeyError as fault:
        raise CheckpointError(f"{folder / 'config.json'} lacks the key {fault}") from fault
    reader = _Reader(folder, device, dtype)
    read = _read_opt if architecture.rope_theta is None else _read_llama
    # Left out, it has transformers' default, which for OPT is tied.
    tied = bool(config.get("tie_word_embeddings", config.get("model_type") == "opt"))
    return architecture, read(reader, architecture, tied)


def _architecture(config: dict[str, Any], folder: Path) -> Architecture:
    kind = config.get("model_type")
    if kind == "opt":
        return _opt_architecture(config, folder)
    if kind not in ("llama", "qwen3", "chameleon"):
        raise CheckpointError(f"{folder} holds a model of type '{kind}'; expected opt, llama, qwen3 or chameleon")
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    required = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "use_sliding_window": False}
    _require(config, required | {"rope_scaling": None}, folder)
    _require(rope, {"rope_type": "default"}, folder)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    return Architecture(
        layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        ffn_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        positions=config["max_position_embeddings"],
        norm="rmsnorm",
        norm_eps=config["rms_norm_eps"],
        activation="swiglu",
        rope_theta=float(rope["rope_theta"]),
        qk_norm={"llama": "none", "qwen3": "rmsnorm", "chameleon": "layernorm"}[kind],
        swin=kind == "chameleon" and bool(config.get("swin_norm", False)),
    )


def _opt_architecture(config: dict[str, Any], folder: Path) -> Architecture:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    required = {
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "word_embed_proj_dim": hidden,
    }
    # Keys that an old file leaves out have transformers' defaults, which are not CM3Leon's.
    defaults = {"enable_bias": True, "layer_norm_elementwise_affine": True}
    _require(defaults | config, required, folder)
    activation = config["activation_function"]
    if activation not in ("relu", "gelu"):
        raise CheckpointError(f"{folder}: activation_function is '{activation}'; expected relu or gelu")
    return Architecture(
        layers=config["num_hidden_layers"],
        hidden_size=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn_size=config["ffn_dim"],
        vocab_size=config["vocab_size"],
        positions=config["max_position_embeddings"],
        norm="layernorm",
        norm_eps=1e-5,  # torch's default, which transformers' OPT uses
        activation=activation,
        rope_theta=None,
        qk_norm="none",
        swin=False,
    )


def _require(config: dict[str, Any], required: dict[str, Any], folder: Path) -> None:
    for key, value in required.items():
        if config.get(key, value) != value:
            raise CheckpointError(
                f"{folder / 'config.json'}: {key} is {config[key]!r}; this decoder runs only {value!r}"
            )


class _Reader:
    """Tensors of a folder by name, each read once, checked and moved to its place."""

    def __init__(self, folder: Path, device: torch.device | str, dtype: torch.dtype):
        self.folder, self.device, self.dtype = folder, device, dtype
        self.files: dict[str, Any] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self.where: dict[str, str] = read_json(index, error=CheckpointError).get("weight_map", {})
        else:
            name = "model.safetensors"
            self.where = dict.fromkeys(self._open(name).keys(), name)

    def _open(self, name: str) -> Any:
        if not SHARD_NAME.fullmatch(name):
            raise CheckpointError(f"{self.folder}: the index names a file outside the folder: {name!r}")
        if name not in self.files:
            try:
                self.files[name] = safe_open(str(self.folder / name), framework="pt")
            except FileNotFoundError as fault:
                raise CheckpointError(f"{self.folder / name} is missing") from fault
            except SafetensorError as fault:
                raise CheckpointError(f"{self.folder / name} is damaged: {fault}") from fault
        return self.files[name]

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        if name not in self.where:
            raise CheckpointError(f"{self.folder} lacks the tensor {name}")
        tensor = self._open(self.where[name]).get_tensor(name)
        if tuple(tensor.shape) != shape:
            found = "x".join(map(str, tensor.shape))
            raise CheckpointError(f"{self.folder}: {name} is {found}; config.json says {'x'.join(map(str, shape))}")
        return tensor.to(self.device, self.dtype)


def _read_opt(read: _Reader, a: Architecture, tied: bool) -> Weights:
    root, width, hidden = "model.decoder", a.heads * a.head_dim, a.hidden_size
    embed = read(f"{root}.embed_tokens.weight", a.vocab_size, hidden)
    # OPT's table starts at row 2: position i is row i + 2.
    positions = read(f"{root}.embed_positions.weight", a.positions + 2, hidden)[2:].contiguous()
    layers = []
    for i in range(a.layers):
        at = f"{root}.layers.{i}"
        qkv = [read(f"{at}.self_attn.{name}_proj.weight", width, hidden) for name in "qkv"]
        out = read(f"{at}.self_attn.out_proj.weight", hidden, width)
        up = read(f"{at}.fc1.weight", a.ffn_size, hidden)
        down = read(f"{at}.fc2.weight", hidden, a.ffn_size)
        layers.append(Layer(torch.cat(qkv), out, up, down, None, None, None, None))
    head = embed if tied else read("lm_head.weight", a.vocab_size, hidden)
    return Weights(embed, positions, layers, None, head)


def _read_llama(read: _Reader, a: Architecture, tied: bool) -> Weights:
    hidden, width, kv_width = a.hidden_size, a.heads * a.head_dim, a.kv_heads * a.head_dim
    embed = read("model.embed_tokens.weight", a.vocab_size, hidden)
    layers = []
    for i in range(a.layers):
        at = f"model.layers.{i}"
        qkv = [read(f"{at}.self_attn.{name}_proj.weight", width if name == "q" else kv_width, hidden) for name in "qkv"]
        gate_up = [read(f"{at}.mlp.{name}_proj.weight", a.ffn_size, hidden) for name in ("gate", "up")]
        layers.append(
            Layer(
                torch.cat(qkv),
                read(f"{at}.self_attn.o_proj.weight", hidden, width),
                torch.cat(gate_up),
                read(f"{at}.mlp.down_proj.weight", hidden, a.ffn_size),
                read(f"{at}.input_layernorm.weight", hidden),
                read(f"{at}.post_attention_layernorm.weight", hidden),
                _read_head_norm(read, a, f"{at}.self_attn.q_norm", a.heads),
                _read_head_norm(read, a, f"{at}.self_attn.k_norm", a.kv_heads),
            )
        )
    head = embed if tied else read("lm_head.weight", a.vocab_size, hidden)
    return Weights(embed, None, layers, read("model.norm.weight", hidden), head)


def _read_head_norm(
    read: _Reader, a: Architecture, name: str, heads: int
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    if a.qk_norm == "none":
        return None
    if a.qk_norm == "rmsnorm":
        return read(f"{name}.weight", a.head_dim), None
    return read(f"{name}.weight", heads, a.head_dim), read(f"{name}.bias", heads, a.head_dim)
