"""From scores to a token: repetition penalty, temperature, top-k, top-p and noise that is a function of its key.

A sample is the arg-max of scores plus Gumbel noise, which is an exact draw from the softmax. The noise is a hash of
(seed, position, token id): no generator state, so a sample does not depend on its batch-mates, and the same numbers
come on every device. Shape letters: B samples, K candidate tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megacm3.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens of one modality are drawn."""

    temperature: float = 1.0
    """Divides the scores; 0 takes the best token."""
    top_k: int = 0
    """Keep the k best tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest best tokens whose probability reaches p; 1 keeps all."""
    repetition_penalty: float = 1.0
    """Text only: scores of text tokens seen before are divided (if positive) or multiplied (if negative) by it."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}; expected 0 (the best token) or more")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; expected 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; expected more than 0 and at most 1 (off)")
        if not self.repetition_penalty > 0:
            raise ConfigError(f"repetition_penalty is {self.repetition_penalty}; expected more than 0 (1 is off)")


def _int64(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


# The constants of SplitMix64 (Steele, Lea, Flood 2014), as signed 64-bit numbers: torch's int64 product wraps.
_STEP = _int64(0x9E3779B97F4A7C15)
_MIX_1 = _int64(0xBF58476D1CE4E5B9)
_MIX_2 = _int64(0x94D049BB133111EB)


def _mix(x: torch.Tensor) -> torch.Tensor:
    # ">>" is arithmetic on int64; the mask makes it the logical shift of the definition.
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def gumbel_noise(seeds_B: torch.Tensor, positions_B: torch.Tensor, ids_K: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise [B, K] fp32 from int64 seeds, positions and token ids."""
    keys_B = _mix(_mix(seeds_B + _STEP) + (positions_B + 1) * _STEP)
    bits_BK = _mix(keys_B[:, None] + (ids_K + 1) * _STEP)
    # The top 52 bits, at the middle of their interval: never 0 and never 1 in float64.
    uniform = (((bits_BK >> 12) & ((1 << 52) - 1)).double() + 0.5) * 2.0**-52
    return (-torch.log(-torch.log(uniform))).float()


def penalize(scores_K: torch.Tensor, seen: Sequence[int], penalty: float) -> torch.Tensor:
    """`scores_K` with the repetition penalty on the ids in `seen` (Keskar et al. 2019, as transformers does it)."""
    if penalty == 1.0 or not seen:
        return scores_K
    index = torch.tensor(sorted(set(seen)), device=scores_K.device)
    known = scores_K[index]
    scores_K = scores_K.clone()
    scores_K[index] = torch.where(known < 0, known * penalty, known / penalty)
    return scores_K


def keep(scores_BK: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Scores after temperature, top-k and top-p, in this order; what is not kept is -inf.

    Ties at the border of top-k or top-p are all kept; top-p always keeps the best token.
    """
    if sampling.temperature > 0:
        scores_BK = scores_BK / sampling.temperature
    if 0 < sampling.top_k < scores_BK.shape[-1]:
        border = scores_BK.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores_BK = scores_BK.masked_fill(scores_BK < border, float("-inf"))
    if sampling.top_p < 1:
        scores_BK = _top_p(scores_BK, sampling.top_p)
    return scores_BK


def _top_p(scores_BK: torch.Tensor, p: float) -> torch.Tensor:
    probabilities = scores_BK.softmax(dim=-1)
    # A few hundred tokens nearly always hold the mass; a sort of the whole vocabulary would cost more than the step.
    for size in (min(256, scores_BK.shape[-1]), scores_BK.shape[-1]):
        best = probabilities.topk(size, dim=-1).values
        total = best.cumsum(dim=-1)
        if bool((total[:, -1] >= p).all()):
            break
    kept = total - best < p
    kept[:, 0] = True
    # Equals at the border all stay, as in `_first_in_nucleus`: else a sample would hang on which way its batch takes.
    border = best.masked_fill(~kept, float("inf")).amin(dim=-1, keepdim=True)
    return scores_BK.masked_fill(probabilities < border, float("-inf"))


def draw(
    scores_BK: torch.Tensor,
    sampling: Sampling,
    seeds_B: torch.Tensor,
    positions_B: torch.Tensor,
    ids_K: torch.Tensor,
) -> torch.Tensor:
    """Index [B] into the K candidates, whose ids are `ids_K`; a candidate with score -inf is never drawn."""
    if sampling.temperature == 0:
        return scores_BK.argmax(dim=-1)
    noise_BK = gumbel_noise(seeds_B, positions_B, ids_K)
    if sampling.top_p < 1:
        scores_BK = keep(scores_BK, replace(sampling, top_p=1.0))
        picked_B = _first_in_nucleus(scores_BK, noise_BK, sampling.top_p)
        if picked_B is not None:
            return picked_B
        sampling = replace(sampling, temperature=1.0, top_k=0)
    return (keep(scores_BK, sampling) + noise_BK).argmax(dim=-1)


_TRIES = 8
"""Best noisy tokens that are looked at before the vocabulary is sorted: all miss a nucleus of 0.9 once in 10^8."""


def _first_in_nucleus(scores_BK: torch.Tensor, noise_BK: torch.Tensor, p: float) -> torch.Tensor | None:
    """The arg-max of scores plus noise over the top-p tokens, without sorting; None if a row has none in the first few.

    A token is among them if the tokens more probable than it have less than p together.
    """
    noisy_BK, probabilities_BK = scores_BK + noise_BK, scores_BK.softmax(dim=-1)
    # With probability p the very best one is inside: one comparison with the vocabulary, in place of eight.
    for tries in (1, min(_TRIES, scores_BK.shape[-1])):
        tries_BT = noisy_BK.topk(tries, dim=-1).indices if tries > 1 else noisy_BK.argmax(dim=-1, keepdim=True)
        higher_BTK = probabilities_BK[:, None] > probabilities_BK.gather(1, tries_BT)[..., None]
        inside_BT = torch.where(higher_BTK, probabilities_BK[:, None], 0).sum(dim=-1) < p
        if bool(inside_BT.any(dim=-1).all()):
            return tries_BT.gather(1, inside_BT.int().argmax(dim=-1, keepdim=True))[:, 0]
    return None
