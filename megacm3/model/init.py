"""Initial weights as a function of (seed, logical name) alone, so that no layout changes them.

A logical tensor is drawn in blocks of whole rows, each from its own keyed generator; a rank draws the blocks that its
box touches. Always on the CPU in fp32, so that CPU and GPU runs start equal.
"""

import math

import torch

from megacm3.command import seed_from
from megacm3.config import ModelConfig
from megacm3.parallel.parts import Part, parts_of

_BLOCK = 1 << 20  # numbers of a block


def _std(name: str, width: int, model: ModelConfig) -> float:
    """Standard deviation of a matrix; 0 = zeros. CM3Leon section 2.3: 0.006, positions 0.0002, output layers 0.

    Adapters begin as nothing (B = 0); A has the deviation of PEFT's uniform numbers, 1 / sqrt(3 x columns).
    """
    if name.endswith((".lora_a", ".lora_b")):
        return 1.0 / math.sqrt(3 * width) if name.endswith("a") else 0.0
    if name == "positions.weight":
        return model.init_positions_std
    if name.endswith((".attn.o.weight", ".mlp.down.weight")):
        return 0.0 if model.init_residual == "zero" else model.init_std / math.sqrt(2 * model.layers)
    return model.init_std


def draw(part: Part, model: ModelConfig, seed: int) -> torch.Tensor:
    """The initial values of one box, fp32 on the CPU."""
    if "norm" in part.name:
        value = 0.0 if part.name.endswith(".bias") else 1.0
        return torch.full(part.shape, value)
    std = _std(part.name, part.global_shape[1], model)
    out = torch.zeros(part.shape)
    if std == 0.0:
        return out
    width = part.global_shape[1]
    rows = max(1, _BLOCK // width)
    first, last = part.offset[0], part.offset[0] + part.shape[0]
    for block in range(first // rows, -(-last // rows)):
        low, high = block * rows, min((block + 1) * rows, part.global_shape[0])
        generator = torch.Generator().manual_seed(seed_from("init", seed, part.name, block))
        values = torch.empty(high - low, width)
        if model.init == "truncated":
            torch.nn.init.trunc_normal_(values, 0.0, std, -3 * std, 3 * std, generator=generator)
        else:
            values.normal_(0.0, std, generator=generator)
        begin, end = max(low, first), min(high, last)
        box = values[begin - low : end - low, part.offset[1] : part.offset[1] + part.shape[1]]
        out[begin - first : end - first] = box
    return out


@torch.no_grad()
def initialize(module: torch.nn.Module, model: ModelConfig, seed: int) -> None:
    """Fill every parameter of a module from its parts. On the meta device there is nothing to fill."""
    for parameter in module.parameters():
        for part in parts_of(parameter) if not parameter.is_meta else ():
            parameter[part.start : part.start + part.shape[0]].copy_(draw(part, model, seed))
