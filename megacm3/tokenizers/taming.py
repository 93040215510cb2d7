"""Weights of taming-transformers (VQ and Gumbel) and of Chameleon's `vqgan.ckpt` as a `diffusers.VQModel`.

The networks are the same but for names, the order of the decoder's levels and the shape of 1x1 convolutions in
attention. The Gumbel quantizer chooses codes by the largest logit of a 1x1 convolution and decodes them through another
table; both are expressed exactly by one nearest-neighbour table, so that the result is a plain VQModel too.
"""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel
from torch import Tensor

from megacm3.errors import ConfigError, DataError
from megacm3.tokenizers.image_config import NetworkConfig
from megacm3.tokenizers.image_network import build_network

_DECODE_SHARE = 2.0**-6
"""Scale of the decoding entries inside a Gumbel table: small, so that they add little to the distances' rounding."""

_RENAMES = (
    (r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"^encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^encoder\.down\.(\d+)\.attn\.(\d+)\.", r"encoder.down_blocks.\1.attentions.\2."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
    (r"^decoder\.up\.(\d+)\.attn\.(\d+)\.", r"decoder.up_blocks.\1.attentions.\2."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def read_network_config(path: str | Path) -> NetworkConfig:
    """The network that a taming or Chameleon YAML (`model.params` with `ddconfig`) describes. Raises ConfigError."""
    from megacm3.resolve import read_yaml

    tree = read_yaml(path)
    params: Any = tree.get("model", {}).get("params", {})
    try:
        dd = params["ddconfig"]
        levels = range(len(dd["ch_mult"]))
        if dd.get("double_z", False) or dd.get("in_channels", 3) != 3 or dd.get("out_ch", 3) != 3:
            raise ConfigError(f"{path}: only networks of 3 channels without double_z are known")
        return NetworkConfig(
            image_size=dd["resolution"],
            channels=[dd["ch"] * factor for factor in dd["ch_mult"]],
            layers_per_block=dd["num_res_blocks"],
            attention_levels=[i for i in levels if dd["resolution"] // 2**i in dd["attn_resolutions"]],
            latent_channels=dd["z_channels"],
            codebook_size=params["n_embed"],
            code_dim=params["embed_dim"],
        )
    except (KeyError, TypeError) as fault:
        raise ConfigError(f"{path} is no taming or Chameleon config: model.params lacks {fault}") from fault


def read_weights(path: str | Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of a `.ckpt`, `.pt` or `.safetensors` file.

    Raises DataError when the file needs pickle (Lightning checkpoints do, which can run any code) and `allow_pickle` is
    false, or is damaged.
    """
    import pickle

    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as fault:
            raise DataError(f"{path} is damaged: {fault}") from fault
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as fault:
        raise DataError(
            f"{path} holds more than tensors, so that reading it can run code of its maker; "
            f"give --trust-pickle if you trust it"
        ) from fault
    except (RuntimeError, EOFError, OSError) as fault:
        raise DataError(f"{path} is damaged: {str(fault).splitlines()[0]}") from fault
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise DataError(f"{path} holds no tensors")
    return tensors


def to_vqmodel(state: dict[str, Tensor], config: NetworkConfig) -> VQModel:
    """A VQModel with these weights and the original's codes. Raises DataError for names or shapes that do not fit."""
    state = {name: value.float() for name, value in state.items() if _belongs(name)}
    gumbel = "quantize.proj.weight" in state
    if gumbel:
        state, code_dim = _nearest_neighbour_form(state)
        config = NetworkConfig(**vars(config) | {"code_dim": code_dim})
    network = build_network(config)
    wanted = network.state_dict()
    found = {_rename(name, len(config.channels)): value for name, value in state.items()}
    wrong = sorted(set(wanted) ^ set(found))
    if wrong:
        where = "has no" if wrong[0] in wanted else "has an unknown"
        raise DataError(f"the checkpoint {where} {wrong[0]} ({len(wrong)} names differ); is it of this config?")
    for name, value in found.items():
        if value.ndim == 4 and wanted[name].ndim == 2:
            value = found[name] = value[:, :, 0, 0]
        if value.shape != wanted[name].shape:
            raise DataError(f"{name} has the shape {list(value.shape)}; the config needs {list(wanted[name].shape)}")
    network.load_state_dict(found)
    return network.eval()


def _belongs(name: str) -> bool:
    return name.split(".")[0] in ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")


def _rename(name: str, levels: int) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    # taming numbers the decoder's levels from the highest resolution, diffusers from the lowest.
    return re.sub(r"^decoder\.up_blocks\.(\d+)\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.", name)


def _nearest_neighbour_form(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """A Gumbel quantizer as a plain codebook.

    Logits are w_k z + b_k. With entries [w_k, s e_k, c_k] and latents [z, 0, 0], the squared distance is
    |z|^2 - 2 (w_k z) + |w_k|^2 + s^2 |e_k|^2 + c_k^2, so c_k^2 = 2 (T - b_k) - |w_k|^2 - s^2 |e_k|^2 makes it
    |z|^2 - 2 (w_k z + b_k) + 2 T: the nearest entry has the largest logit. T is the smallest value that leaves all c_k
    real. Decoding reads the part s e_k only.
    """
    state = dict(state)
    w = state.pop("quantize.proj.weight")[:, :, 0, 0].double()
    b = state.pop("quantize.proj.bias").double()
    e = state.pop("quantize.embed.weight").double() * _DECODE_SHARE
    halves = b + (w.square().sum(1) + e.square().sum(1)) / 2
    c = (2 * (halves.max() - halves)).clamp_min(0).sqrt()
    state["quantize.embedding.weight"] = torch.cat([w, e, c[:, None]], 1).float()
    into, out = state["quant_conv.weight"], state["post_quant_conv.weight"]
    if into.shape[0] != w.shape[1] or out.shape[1] != e.shape[1]:
        raise DataError(f"quantize.proj reads {w.shape[1]} channels; quant_conv gives {into.shape[0]}")
    further = e.shape[1] + 1
    state["quant_conv.weight"] = torch.cat([into, into.new_zeros((further, *into.shape[1:]))])
    state["quant_conv.bias"] = torch.cat([state["quant_conv.bias"], into.new_zeros(further)])
    before, after = (out.new_zeros((out.shape[0], n, *out.shape[2:])) for n in (w.shape[1], 1))
    state["post_quant_conv.weight"] = torch.cat([before, out / _DECODE_SHARE, after], 1)
    return state, w.shape[1] + further
