"""Our image tokenizer (diffusers' VQModel) as the `vqmodel` of ChameleonForConditionalGeneration: encoder and codebook.

That class has no decoder; the exported folder holds it in `image_tokenizer/`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megacm3.checkpoint.boxes import whole
from megacm3.checkpoint.tensors import DTYPES, OpenFiles, read_header
from megacm3.files import read_json, read_manifest

PREFIX = "model.vqmodel."
WEIGHTS = "diffusion_pytorch_model.safetensors"
GROUPS = 32
"""Groups of every norm in transformers' encoder."""

# From diffusers' names to transformers', which are taming's: the inverse of tokenizers/taming.py.
_RENAMES = (
    (r"down_blocks\.(\d+)\.resnets\.(\d+)\.", r"down.\1.block.\2."),
    (r"down_blocks\.(\d+)\.attentions\.(\d+)\.", r"down.\1.attn.\2."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"mid_block\.resnets\.(\d+)\.", lambda m: f"mid.block_{int(m[1]) + 1}."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
    (r"^encoder\.conv_norm_out\.", "encoder.norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)


@dataclass(frozen=True)
class VqTensor:
    """A tensor of the `vqmodel`, and where it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    source: str
    """Name in the tokenizer's file; empty: zeros."""


class VqModel:
    """The `vqmodel` of an export."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, VqTensor], folder: Path | None) -> None:
        self.config = config
        """`vq_config`."""
        self.tensors = tensors
        """Full name in the export -> tensor."""
        self._files = OpenFiles(folder) if folder else None

    def read(self, name: str) -> torch.Tensor:
        """The values of a tensor."""
        tensor = self.tensors[name]
        if not tensor.source or self._files is None:
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        header = read_header(self._files.folder / WEIGHTS)[tensor.source]
        shape = tuple(header["shape"])
        return self._files.slice(WEIGHTS, tensor.source, whole(shape).within(whole(shape))).reshape(tensor.shape)

    @staticmethod
    def of(folder: Path) -> "VqModel | str":
        """The tokenizer in `folder`, or why transformers' encoder cannot be it."""
        tree = read_json(folder / "config.json")
        channels, groups = tree["block_out_channels"], tree["norm_num_groups"]
        if groups != GROUPS:
            return f"its norms have {groups} groups; ChameleonVQVAE has {GROUPS}"
        if any(width % channels[0] for width in channels):
            return f"its channels {channels} are no multiples of the first, as ChameleonVQVAE's are"
        if not tree.get("mid_block_add_attention", True):
            return "it has no attention in the middle, as ChameleonVQVAE has"
        size = read_manifest(folder, "image_tokenizer").settings["image_size"]
        attention = [size >> i for i, kind in enumerate(tree["down_block_types"]) if kind.startswith("Attn")]
        config = _config(
            resolution=size,
            embed_dim=tree.get("vq_embed_dim") or tree["latent_channels"],
            num_embeddings=tree["num_vq_embeddings"],
            latent_channels=tree["latent_channels"],
            base_channels=channels[0],
            channel_multiplier=[width // channels[0] for width in channels],
            num_res_blocks=tree["layers_per_block"],
            attn_resolutions=attention or None,
        )
        tensors = {}
        for source, entry in read_header(folder / WEIGHTS).items():
            if source.startswith("decoder."):
                continue
            shape = tuple(entry["shape"])
            # transformers has 1x1 convolutions where diffusers has linear layers.
            shape += (1, 1) if re.search(r"\.to_(q|k|v|out\.0)\.weight$", source) else ()
            tensors[PREFIX + _rename(source)] = VqTensor(DTYPES[entry["dtype"]], shape, source)
        return VqModel(config, tensors, folder)

    @staticmethod
    def blank(codebook_size: int, side: int) -> "VqModel":
        """The smallest `vqmodel` that loads, all zeros: such an export takes pictures as ids only."""
        from transformers import ChameleonVQVAEConfig
        from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

        config = _config(
            resolution=side,
            embed_dim=1,
            num_embeddings=codebook_size,
            latent_channels=1,
            base_channels=GROUPS,
            channel_multiplier=[1],
            num_res_blocks=1,
            attn_resolutions=None,
        )
        with torch.device("meta"):
            state = ChameleonVQVAE(ChameleonVQVAEConfig(**config)).state_dict()
        tensors = {PREFIX + name: VqTensor(torch.float32, tuple(value.shape), "") for name, value in state.items()}
        return VqModel(config, tensors, None)


def _config(**fields: Any) -> dict[str, Any]:
    fixed = {"model_type": "chameleon_vqgan", "double_latent": False, "in_channels": 3, "dropout": 0.0}
    return fixed | {"attn_type": "vanilla"} | fields


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name
