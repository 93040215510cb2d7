"""The image tokenizer: a frozen `diffusers.VQModel` that turns square pictures into codes and back.

Codes are 0..codebook_size-1 in raster order. All arithmetic is float32: lower precision and TF32 change codes.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megacm3.errors import ConfigError, DataError
from megacm3.files import new_folder, read_manifest, write_manifest

if TYPE_CHECKING:
    import torch
    from diffusers import VQModel

KIND = "image_tokenizer"
_DISTANCES = 1 << 24
"""Entries of one block of the distance matrix between latents and codebook (64 MiB)."""


def torch_device(name: str) -> "torch.device":
    """The device. Raises ConfigError when it is asked for and is not there."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as fault:
        raise ConfigError(f"--device {name} is no device; expected cpu, cuda or cuda:N") from fault
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: no GPU is visible here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: {torch.cuda.device_count()} GPUs are here, numbered from 0")
    return device


def full_precision() -> Any:
    """A context in which matrix products and convolutions on a GPU are true float32, without autograd."""
    import contextlib

    import torch

    stack = contextlib.ExitStack()
    stack.enter_context(torch.inference_mode())
    stack.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    stack.callback(lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", before))
    return stack


class ImageTokenizer:
    """A trained tokenizer. Make it with `ImageTokenizer.load`."""

    def __init__(self, network: "VQModel", image_size: int, fingerprint: str, device: str = "cpu") -> None:
        self._device = torch_device(device)
        self._network = network.to(self._device).eval().requires_grad_(False)
        self.image_size = image_size
        """Side of a picture in pixels."""
        self.factor = 2 ** (len(network.config.block_out_channels) - 1)
        """Pixels per code along a side."""
        side = image_size // self.factor
        self.grid = (side, side)
        """Codes (rows, columns) of a picture."""
        self.codebook_size: int = network.config.num_vq_embeddings
        self.fingerprint = fingerprint

    @staticmethod
    def load(folder: str | Path, device: str = "cpu") -> "ImageTokenizer":
        """Read a tokenizer folder. Raises DataError when it is missing, damaged or of another kind."""
        manifest = read_manifest(folder, KIND, verify="sha256")
        network = load_network(folder)
        return ImageTokenizer(network, manifest.settings["image_size"], manifest.fingerprint, device)

    def encode(self, pixels: "np.ndarray | torch.Tensor") -> "torch.Tensor":
        """uint8 [n, s, s, 3] -> int64 [n, rows * columns] on the CPU. Raises DataError for another shape or type."""
        import torch

        pixels = torch.as_tensor(pixels)
        size = self.image_size
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or tuple(pixels.shape[1:]) != (size, size, 3):
            raise DataError(
                f"pictures are {pixels.dtype} {list(pixels.shape)}; expected torch.uint8 [n, {size}, {size}, 3]"
            )
        if len(pixels) == 0:
            return torch.zeros((0, self.grid[0] * self.grid[1]), dtype=torch.int64)
        with full_precision():
            latents = self._network.encode(to_unit(pixels.to(self._device))).latents
            codes = nearest_codes(latents, self._network.quantize.embedding.weight)
        return codes.reshape(len(pixels), -1).cpu()

    def decode(self, codes: "np.ndarray | torch.Tensor") -> "torch.Tensor":
        """int64 [n, rows * columns] -> uint8 [n, s, s, 3] on the CPU. Raises DataError for codes out of range."""
        import torch

        codes = torch.as_tensor(codes)
        rows, columns = self.grid
        if codes.ndim != 2 or codes.shape[1] != rows * columns:
            raise DataError(f"codes have the shape {list(codes.shape)}; expected [n, {rows * columns}]")
        if codes.numel() and not (0 <= int(codes.min()) and int(codes.max()) < self.codebook_size):
            raise DataError(f"codes {int(codes.min())}..{int(codes.max())} outside 0..{self.codebook_size - 1}")
        with full_precision():
            entries = self._network.quantize.embedding(codes.to(self._device, torch.int64))
            latents = entries.reshape(len(codes), rows, columns, -1).permute(0, 3, 1, 2)
            pictures = self._network.decode(latents, force_not_quantize=True).sample
            return to_pixels(pictures).cpu()


def to_unit(pixels: "torch.Tensor") -> "torch.Tensor":
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w] in [-1, 1], x / 255 * 2 - 1 (Chameleon's released scaling)."""
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def to_pixels(pictures: "torch.Tensor") -> "torch.Tensor":
    """float [n, 3, h, w] -> uint8 [n, h, w, 3], clipped to [-1, 1] and rounded."""
    import torch

    return pictures.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def nearest_codes(latents: "torch.Tensor", codebook: "torch.Tensor") -> "torch.Tensor":
    """float [n, d, h, w], float [k, d] -> int64 [n, h, w]: the nearest entry, in blocks, lowest code on a tie."""
    import torch

    n, d, h, w = latents.shape
    flat = latents.permute(0, 2, 3, 1).reshape(-1, d)
    rows = max(1, _DISTANCES // len(codebook))
    blocks = [torch.cdist(flat[i : i + rows], codebook).argmin(1) for i in range(0, len(flat), rows)]
    return torch.cat(blocks).reshape(n, h, w)


def load_network(folder: str | Path) -> "VQModel":
    """The `diffusers.VQModel` in `folder`, in float32. Raises DataError when it cannot be loaded whole."""
    import torch
    from diffusers import VQModel

    try:
        network, info = VQModel.from_pretrained(
            str(folder),
            torch_dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            low_cpu_mem_usage=False,
        )
    except (OSError, ValueError, RuntimeError) as fault:
        raise DataError(f"{folder} holds no diffusers.VQModel: {str(fault).splitlines()[0]}") from fault
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong:
        raise DataError(f"{folder}: the weights do not fit config.json ({len(wrong)} names differ, such as {wrong[0]})")
    return network


def save_image_tokenizer(
    network: "VQModel",
    image_size: int,
    output: str | Path,
    *,
    settings: dict[str, Any] | None = None,
    inputs: dict[str, str] | None = None,
    extra: dict[str, bytes] | None = None,
    replace: bool = False,
) -> ImageTokenizer:
    """Freeze `network` as the tokenizer folder `output`; `extra` are further files (a report) by name."""
    factor = 2 ** (len(network.config.block_out_channels) - 1)
    if image_size % factor:
        raise ConfigError(f"image_size = {image_size} is not divisible by {factor}, the network's reduction")
    grid = [image_size // factor] * 2
    facts = {"image_size": image_size, "grid": grid, "codebook_size": network.config.num_vq_embeddings}
    with new_folder(output, replace=replace) as folder:
        network.save_pretrained(folder, safe_serialization=True)
        for name, content in (extra or {}).items():
            (folder / name).write_bytes(content)
        write_manifest(folder, KIND, facts | (settings or {}), inputs or {})
    return ImageTokenizer.load(output)
