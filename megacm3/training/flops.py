"""Floating-point operations that the model's mathematics needs, and what devices can do at most."""

import re

from megacm3.config import ModelConfig

PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "L40S": 362e12,
    "L4": 121e12,
}
"""bf16 operations a second without sparsity, by words of the name that CUDA gives (data sheets of NVIDIA); the first
that fits counts."""


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Of one device in `train.dtype`; None where it is not known, as for a slice of a GPU."""
    words = set(re.split(r"[\s-]+", device_name))
    if dtype != "bf16" or "MIG" in words:
        return None
    return next((peak for name, peak in PEAKS.items() if words.issuperset(name.split())), None)


def flops_per_token(model: ModelConfig) -> float:
    """Forward and backward of one token of a full sequence: 6 a matrix element, and 12 x layers x hidden x length for
    attention scores and values (arXiv 2204.02311, appendix B: no discount for the causal mask, none for recompute).
    """
    head = model.hidden_size // model.heads
    attention = model.hidden_size * head * (2 * model.heads + 2 * model.kv_heads)
    feed_forward = model.hidden_size * model.ffn_size * (3 if model.activation == "swiglu" else 2)
    matrices = model.layers * (attention + feed_forward) + model.hidden_size * model.vocab_size
    return 6.0 * matrices + 12.0 * model.layers * model.hidden_size * model.sequence_length
