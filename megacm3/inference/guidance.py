"""Classifier-free guidance and contrastive decoding: several streams' logits become one row of scores.

Shape letters: B samples, S streams, K candidate tokens (those that the modality allows: streams are compared within
them). Every stream of a sample then receives the same drawn token.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from megacm3.errors import ConfigError


class Guidance(Protocol):
    """What turns streams into scores."""

    @property
    def streams(self) -> int:
        """Number of streams that it wants."""

    def __call__(self, logits_BSK: torch.Tensor) -> torch.Tensor:
        """scores_BK, fp32."""


def _check_finite(name: str, scale: float) -> None:
    if not math.isfinite(scale):
        raise ConfigError(f"{name} is {scale}; expected a finite scale (1 is off)")


@dataclass(frozen=True)
class Plain:
    """No guidance: the one stream's logits."""

    streams = 1

    def __call__(self, logits_BSK: torch.Tensor) -> torch.Tensor:
        """scores_BK"""
        return logits_BSK[:, 0]


@dataclass(frozen=True)
class ClassifierFree:
    """CM3Leon eq. 1-2: l_unc + scale (l_cond - l_unc). Streams: with the text, without it."""

    scale: float = 3.0

    streams = 2

    def __post_init__(self) -> None:
        _check_finite("guidance", self.scale)

    def __call__(self, logits_BSK: torch.Tensor) -> torch.Tensor:
        """scores_BK"""
        conditional, unconditional = logits_BSK.unbind(1)
        # Written as a weighted sum, so that scale 1 and 0 are the one stream and the other to the last bit.
        return self.scale * conditional + (1 - self.scale) * unconditional


@dataclass(frozen=True)
class ThreeStream:
    """Editing, and Chameleon's server: l_unc + image (l_img - l_unc) + text (l_full - l_img).

    Streams: the full prompt, its images without the text, neither. CM3Leon 4.1 edits with image 1.5 and text 7.5;
    Chameleon's server has 1.2 and 3.0.
    """

    image: float = 1.5
    text: float = 7.5

    streams = 3

    def __post_init__(self) -> None:
        _check_finite("guidance", self.text)
        _check_finite("image guidance", self.image)

    def __call__(self, logits_BSK: torch.Tensor) -> torch.Tensor:
        """scores_BK"""
        full, image, unconditional = logits_BSK.unbind(1)
        return self.text * full + (self.image - self.text) * image + (1 - self.image) * unconditional


@dataclass(frozen=True)
class Contrastive:
    """CM3Leon eq. 3: log p_exp - log p_ama on V = {y: p_exp(y) >= alpha * kmax p_exp}, -inf elsewhere.

    kmax is the k-th largest probability (CD-K); k = 1 is plain CD. Streams: expert (with the text), amateur (without).
    k and alpha are not in the paper; its public script has alpha 0.5.
    """

    k: int = 1
    alpha: float = 0.5
    expert_temperature: float = 1.0
    """Divides the expert's logits first (the public script: 0.8)."""
    amateur_temperature: float = 1.0
    """Divides the amateur's logits first (the public script: 0.5)."""

    streams = 2

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"contrastive k is {self.k}; expected 1 (plain CD) or more")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"contrastive alpha is {self.alpha}; expected 0 to 1")
        if not all(0 < t < math.inf for t in (self.expert_temperature, self.amateur_temperature)):
            raise ConfigError("the temperatures of contrastive decoding must be above 0 and finite")

    def __call__(self, logits_BSK: torch.Tensor) -> torch.Tensor:
        """scores_BK"""
        expert = (logits_BSK[:, 0] / self.expert_temperature).log_softmax(dim=-1)
        amateur = (logits_BSK[:, 1] / self.amateur_temperature).log_softmax(dim=-1)
        k = min(self.k, expert.shape[-1])
        border = expert.topk(k, dim=-1).values[:, -1:]
        border = border + (math.log(self.alpha) if self.alpha > 0 else float("-inf"))
        return (expert - amateur).masked_fill(expert < border, float("-inf"))


def choose_guidance(
    scale: float | None = None, contrastive_k: int | None = None, contrastive_alpha: float | None = None
) -> Guidance:
    """The guidance that a user's three numbers mean; with none of them, classifier-free at 3 (the paper's demo).

    Scale 1 runs no second stream. Raises ConfigError when both kinds are asked for.
    """
    if contrastive_k is not None or contrastive_alpha is not None:
        if scale is not None:
            raise ConfigError(
                f"guidance {scale} and contrastive decoding exclude each other; leave out --guidance or --contrastive-*"
            )
        alpha = 0.5 if contrastive_alpha is None else contrastive_alpha
        return Contrastive(1 if contrastive_k is None else contrastive_k, alpha)
    if scale == 1:
        return Plain()
    return ClassifierFree(3.0 if scale is None else scale)
