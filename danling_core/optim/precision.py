"""Mixed precision: autocast contexts and the gradient scaler."""

from __future__ import annotations

import contextlib
import platform
from typing import Any

import torch

from danling_core.errors import ConfigError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NULL = contextlib.nullcontext()


def is_bf16_native() -> bool:
    """Return whether this CPU computes in bf16 by itself; true where torch cannot tell."""
    try:
        supported = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        return supported and (not is_x86 or bool(torch.cpu._is_avx512_bf16_supported()))
    except (AttributeError, RuntimeError):
        return True


class Precision:
    """Autocast and gradient scalers for the config's `precision` and `non_finite` on one device.

    Args:
        name: fp32, bf16 or fp16.
        device_type: cpu, or the kind of accelerator.
        skip_non_finite: leave out a step whose gradients are not finite, on all ranks alike: gradients are
            reduced before they are looked at, so every rank sees the same.
    """

    def __init__(self, name: str, device_type: str, *, skip_non_finite: bool) -> None:
        self.dtype = _DTYPES.get(name)
        if self.dtype is not None and not torch.amp.is_autocast_available(device_type):
            raise ConfigError(
                f"precision is {name!r}, which torch does not have on {device_type}: precision=fp32"
            )
        self.skips_non_finite = skip_non_finite
        self._device_type = device_type

    def make_scaler(self) -> torch.amp.GradScaler | None:
        """Return a gradient scaler for one optimizer, or None where none is needed."""
        if self.dtype is torch.float16:
            return torch.amp.GradScaler(self._device_type)
        if not self.skips_non_finite:
            return None
        # for its look at the gradients alone: the scale stays 1
        return torch.amp.GradScaler(self._device_type, init_scale=1.0, growth_interval=1_000_000_000)

    def update(self, scaler: torch.amp.GradScaler) -> None:
        """After a step: fp16 finds the largest scale that does not overflow; elsewhere it is 1."""
        scaler.update(None if self.dtype is torch.float16 else 1.0)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context for the forward pass and the loss; costs nothing in fp32."""
        if self.dtype is None:
            return _NULL
        return torch.autocast(self._device_type, dtype=self.dtype)
