"""Operations that a device can make in a second, by its data sheet."""

from __future__ import annotations

import functools

import torch

# Dense bf16 operations in a second, from the vendors' data sheets; the first name that the device's contains.
_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI250X": 191e12,
    "V100": 125e12,
    "T4": 65e12,
}


@functools.cache
def peak_flops(device: torch.device) -> float | None:
    """Return the most operations in a second, at bf16 (fp16 where it has none) without sparsity; None if not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAKS.items() if known in name), None)
