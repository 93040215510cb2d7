"""Distances of drawn pictures from real ones: FID over any local feature network, CLIPScore, recall of retrieval.

A figure holds only for its protocol (network, size, number of pictures), whose hash stands beside it: figures of
different protocols are not comparable, and `compared` refuses them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megacm3.errors import ConfigError, DataError
from megacm3.files import sha256_json
from megacm3.retrieval.encoder import Encoder

CLIP_SCALE = 100.0
"""torchmetrics' scale; Hessel et al. 2021 use 2.5 and leave out negative cosines as well."""


class _Features(torch.nn.Module):
    """An encoder's picture vectors as torchmetrics wants its features: uint8 [n, 3, s, s] -> fp32 [n, d]."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_features = encoder.dim

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        pixels = pictures.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return torch.from_numpy(self.encoder.encode_images(pixels))


def protocol(task: str, encoder: Encoder, **facts: Any) -> dict[str, Any]:
    """What a figure depends on, and the hash of it."""
    held = {"task": task, "network": encoder.fingerprint, **facts}
    return held | {"hash": sha256_json(held)}


def compared(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The figures that two results have both, by name. Raises DataError where their protocols differ, naming how."""
    one, other = a.get("protocol", {}), b.get("protocol", {})
    if not one or one.get("hash") != other.get("hash"):
        names = [name for name in sorted({*one, *other} - {"hash"}) if one.get(name) != other.get(name)]
        told = ", ".join(f"{name} ({one.get(name)} and {other.get(name)})" for name in names)
        raise DataError(f"results of different protocols cannot be compared: {told}")
    first, second = _figures(a), _figures(b)
    return {name: (value, second[name]) for name, value in first.items() if name in second}


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a result by name, those of a table inside it as `table name`."""
    found = {name: value for name, value in result.items() if isinstance(value, float)}
    for table, rows in result.items():
        if isinstance(rows, Mapping) and table not in ("protocol", "drawing"):
            found |= {f"{table} {name}": value for name, value in rows.items() if isinstance(value, float)}
    return found


def frechet_distance(real: np.ndarray, made: np.ndarray, encoder: Encoder) -> dict[str, Any]:
    """Frechet distance between the features of pictures uint8 [n, s, s, 3].

    Raises ConfigError without torchmetrics, DataError for fewer than two pictures on a side.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as fault:
        raise ConfigError("--task fid needs the package torchmetrics (extra evaluate)") from fault
    if min(len(real), len(made)) < 2:
        raise DataError(f"{len(real)} real and {len(made)} drawn pictures; the covariance needs two of each at least")
    side = real.shape[1]
    metric = FrechetInceptionDistance(_Features(encoder), input_img_size=(3, side, side)).set_dtype(torch.float64)
    for pictures, is_real in ((real, True), (made, False)):
        for start in range(0, len(pictures), 64):
            block = torch.from_numpy(pictures[start : start + 64].copy()).permute(0, 3, 1, 2)
            metric.update(block, real=is_real)
    facts = protocol("fid", encoder, pixels=side, real=len(real), made=len(made), features=encoder.dim)
    return {"fid": float(metric.compute()), "protocol": facts}


def clip_score(pictures: np.ndarray, captions: Sequence[str], encoder: Encoder) -> dict[str, Any]:
    """Mean of 100 max(cosine, 0) of pictures uint8 [n, s, s, 3] and the captions that they were drawn for."""
    cosines = np.sum(encoder.encode_images(pictures) * encoder.encode_texts(list(captions)), axis=1)
    facts = protocol("clip", encoder, pixels=pictures.shape[1])
    return {
        "clip_score": float(CLIP_SCALE * np.maximum(cosines, 0).mean()),
        "pictures": len(pictures),
        "protocol": facts,
    }


def recall(pictures: np.ndarray, captions: Sequence[str], encoder: Encoder, at: Sequence[int]) -> dict[str, Any]:
    """Share of captions whose picture is among the k nearest, and the other way round; equal captions are one."""
    images, texts = encoder.encode_images(pictures), encoder.encode_texts(list(captions))
    scores = torch.from_numpy(texts @ images.T)
    names = np.unique(np.asarray(captions), return_inverse=True)[1]
    right = torch.from_numpy(names[:, None] == names[None, :])
    result: dict[str, Any] = {"pairs": len(captions), "protocol": protocol("retrieval", encoder, pairs=len(captions))}
    for name, table in (("text_to_image", scores), ("image_to_text", scores.T)):
        nearest = table.topk(min(max(at), len(captions)), dim=1).indices
        hits = right.gather(1, nearest)
        result[name] = {f"recall@{k}": float(hits[:, :k].any(dim=1).float().mean()) for k in at}
    return result
