"""Losses of image tokenizer training beyond pixels: feature distance and a patch discriminator."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megacm3.errors import ConfigError

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's pixel statistics, which VGG16 and most vision models were trained with."""
_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
_VGG16_TAPS = (3, 8, 15, 22, 29)
"""Layers after which LPIPS compares features: the last ReLU of each resolution."""


class FeatureDistance(nn.Module):
    """Distance of two pictures in a frozen network's features: LPIPS without its learned weights."""

    mean: Tensor
    std: Tensor

    def __init__(self, path: str | Path) -> None:
        """Raises ConfigError when `path` holds neither a transformers vision model nor torchvision's VGG16."""
        super().__init__()
        self.features: nn.Module = _vgg16(Path(path)) if Path(path).is_file() else _vision_model(Path(path))
        self.requires_grad_(False).eval()
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """float [n, 3, h, w] in [-1, 1] twice -> scalar: mean over layers of the distance of unit feature vectors."""
        both = ((torch.cat([x, y]) + 1) / 2 - self.mean) / self.std
        distances = []
        for feature in self.features(both):
            unit = F.normalize(feature.float(), dim=1)
            a, b = unit.chunk(2)
            distances.append((a - b).square().sum(1).mean())
        return torch.stack(distances).mean()


class _Vgg16(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for item in _VGG16:
            if item == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(width, int(item), 3, padding=1), nn.ReLU()]
                width = int(item)
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        taps = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in _VGG16_TAPS:
                taps.append(x)
        return taps


def _vgg16(path: Path) -> nn.Module:
    network = _Vgg16()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict({name: value for name, value in state.items() if name.startswith("features.")})
    except Exception as fault:
        raise ConfigError(f"loss.perceptual_path = {path} is not torchvision's VGG16: {fault}") from fault
    return network


class _VisionModel(nn.Module):
    def __init__(self, model: nn.Module, size: int | None) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, x: Tensor) -> list[Tensor]:
        if self.size and x.shape[-1] != self.size:
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True)
        hidden = self.model(pixel_values=x, output_hidden_states=True).hidden_states
        # Convolutional models give [n, c, h, w]; transformers give [n, tokens, c].
        return [h if h.ndim == 4 else h.transpose(1, 2) for h in hidden]


def _vision_model(path: Path) -> nn.Module:
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as fault:
        raise ConfigError(f"loss.perceptual_path = {path}: {str(fault).splitlines()[0]}") from fault
    model = getattr(model, "vision_model", model)
    return _VisionModel(model, getattr(model.config, "image_size", None))


class PatchDiscriminator(nn.Sequential):
    """PatchGAN of 3 strided layers and 64 base channels (taming-transformers), with group norm instead of batch norm,
    so that its output for a picture does not depend on the other pictures, nor on the number of ranks."""

    def __init__(self, base: int = 64, layers: int = 3) -> None:
        blocks: list[nn.Module] = [nn.Conv2d(3, base, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = base
        for number in range(1, layers + 1):
            stride, wider = (2 if number < layers else 1), base * min(2**number, 8)
            blocks += [nn.Conv2d(width, wider, 4, stride, 1, bias=False), nn.GroupNorm(16, wider), nn.LeakyReLU(0.2)]
            width = wider
        super().__init__(*blocks, nn.Conv2d(width, 1, 4, 1, 1))


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of the discriminator: scalar."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, mean: Callable[[Tensor], Tensor] = lambda g: g
) -> Tensor:
    """|gradient of the reconstruction| / |gradient of the adversarial loss| at the decoder's last weight, 0..1e4.

    `mean` averages a gradient over the ranks, so that the weight is that of the whole batch.
    """
    (ours,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (theirs,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (mean(ours).norm() / (mean(theirs).norm() + 1e-4)).clamp(0, 1e4).detach()
