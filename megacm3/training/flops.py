"""What devices can do at most; what a model needs is in megacm3/planning/counts.py."""

import re

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
