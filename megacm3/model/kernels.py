"""Which kernels a run uses: the one place that looks at what the machine can do, with a reason for every choice.

Whatever is chosen, parameters stay this package's own tensors under their logical names, and torch's kernels serve
where nothing faster is there. What is left out on purpose:

TransformerEngine's linear layers and norms: in bf16 their products are the same cuBLAS calls; what they add, fp8, is
no dtype of this trainer, and they own their weights and an extra state that checkpoints would have to know.
Apex's and DeepSpeed's fused Adam: the same few passes over memory as torch's fused AdamW; they keep one count of
steps a group where checkpoints keep one a parameter, and DeepSpeed's is compiled at first use.
`torch.compile` of the whole step: DeepSpeed's hooks, megatron-core's autograd functions and the collectives would
break it into pieces. What gains is compiled by itself: the element-wise work between two matrix products.
"""

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

import torch
import torch.nn.functional as F

from megacm3.config import Config
from megacm3.model.functions import rms_norm, rotate, swiglu

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Capabilities:
    """What a machine and its environment have."""

    cuda: tuple[int, int] | None
    """Compute capability of the device, None on the CPU."""
    apex: bool = False
    """NVIDIA's, with its compiled norms; the `apex` of the package index has none."""
    transformer_engine: bool = False
    triton: bool = False


def capabilities(device: torch.device) -> Capabilities:
    """Look at this process's device and environment; nothing optional is imported."""
    if device.type != "cuda":
        return Capabilities(None)
    return Capabilities(
        torch.cuda.get_device_capability(device),
        apex=_has("apex.normalization") and _has("fused_layer_norm_cuda"),
        transformer_engine=_has("transformer_engine.pytorch"),
        triton=_has("triton"),
    )


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a part of a package that is not there
        return False


@dataclass(frozen=True)
class Choice:
    """A kernel's name and why it was chosen."""

    name: str
    reason: str


ADAM = Choice("torch", "fused AdamW on every device; Apex's and DeepSpeed's make no fewer passes over memory")


@dataclass(frozen=True)
class Kernels:
    """The choices of a run."""

    attention: Choice
    """transformer_engine | torch."""
    norm: Choice
    """apex | torch | own."""
    adam: Choice
    """torch."""
    compiled: Choice
    """elementwise | none."""
    overlap: Choice
    """Of communication with computation: on | off."""

    def report(self) -> None:
        """Log every choice with its reason; for rank 0."""
        for field in fields(self):
            choice = getattr(self, field.name)
            log.info("kernels: %s = %s (%s)", field.name, choice.name, choice.reason)


def choose(found: Capabilities, config: Config) -> Kernels:
    """The kernels for a machine and a config. Pure: capabilities are data."""
    if found.cuda is None:
        return Kernels(
            attention=Choice("torch", "no CUDA device; torch has flash attention for the CPU"),
            norm=Choice("own", "no CUDA device; keeps its input alone, where torch's keeps the normalised values too"),
            adam=ADAM,
            compiled=Choice("none", "no CUDA device; matrix products take most of the time"),
            overlap=Choice("off", "no CUDA device; gloo's sums and the products need the same cores"),
        )
    return Kernels(_attention(found, config), _norm(found), ADAM, _compiled(found), _overlap(config))


def _attention(found: Capabilities, config: Config) -> Choice:
    assert found.cuda is not None
    if config.data.document_mask:
        return Choice("torch", "data.document_mask gives a mask of its own; torch's memory-efficient kernel takes it")
    if not found.transformer_engine:
        return Choice("torch", "TransformerEngine is not installed; torch has flash attention and cuDNN's")
    if config.train.dtype != "bf16" or found.cuda < (8, 0):
        return Choice("torch", "TransformerEngine's flash attention needs train.dtype = bf16 and capability 8.0")
    return Choice("transformer_engine", "picks flash attention or cuDNN's by shape and device")


def _norm(found: Capabilities) -> Choice:
    if found.apex:
        return Choice("apex", "fused forward and backward, with this package's own weights")
    return Choice("torch", "Apex is not installed; torch's norms are one kernel each way too")


def _compiled(found: Capabilities) -> Choice:
    if not found.triton:
        return Choice("none", "triton is not installed")
    if found.cuda is None or found.cuda < (7, 0):
        return Choice("none", "triton needs capability 7.0")
    return Choice("elementwise", "SwiGLU and the rotation of q and k become one kernel each way")


def _overlap(config: Config) -> Choice:
    if config.parallel.tensor > 1:
        return Choice("on", "CUDA_DEVICE_MAX_CONNECTIONS=1 starts tensor-parallel sums before the product beside them")
    return Choice("on", "ZeRO's sums run beside the backward pass where the DeepSpeed JSON has overlap_comm")


def set_environment(config: Config) -> None:
    """What must be set before the first use of CUDA; a value that is there already stays."""
    if config.parallel.tensor > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


PLAIN = choose(Capabilities(None), Config())
"""What the CPU uses; the same results everywhere."""


Norms = tuple[
    Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor], Callable[[torch.Tensor, float], torch.Tensor]
]


def norms(kernels: Kernels) -> Norms:
    """(RMSNorm of x, weight and eps; LayerNorm without parameters of x and eps), over the last dimension."""
    if kernels.norm.name == "apex":
        from apex.normalization.fused_layer_norm import fused_layer_norm, fused_rms_norm_affine

        return (
            lambda x, weight, eps: fused_rms_norm_affine(x, weight, tuple(weight.shape), eps),
            lambda x, eps: fused_layer_norm(x, (x.shape[-1],), eps),
        )
    return rms_norm, lambda x, eps: F.layer_norm(x, x.shape[-1:], eps=eps)


def fused_attention(kernels: Kernels, heads: int, kv_heads: int, size: int) -> torch.nn.Module | None:
    """TransformerEngine's causal attention over [S, B, A, D], which has no parameters; None for torch's."""
    if kernels.attention.name != "transformer_engine":
        return None
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(  # type: ignore[no-any-return]
        heads,
        size,
        num_gqa_groups=kv_heads,
        attention_dropout=0.0,
        attn_mask_type="causal",
        qkv_format="sbhd",
    )


@cache
def _compile(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return torch.compile(function, dynamic=False)


def _plain_swiglu(inner: torch.Tensor) -> torch.Tensor:
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate) * up


def elementwise(kernels: Kernels) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """(SwiGLU of the fused gate and up; rotation of x by cos and sin)."""
    if kernels.compiled.name == "none":
        return swiglu, rotate
    # The compiler decides itself to keep the input alone.
    return _compile(_plain_swiglu), _compile(rotate)
