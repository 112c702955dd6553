"""A look for weights that are not finite, in a snapshot that is about to be saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from danling_core.errors import NonFiniteLossError


def weights_check(modules: Mapping[str, nn.Module], step: int) -> Callable[[Mapping[str, Any]], None]:
    """Return a function that looks at the trained weights of a snapshot, in the background of the loop.

    A finite loss may have a gradient that is not, and a resume from such weights could only fail. The function
    raises NonFiniteLossError.

    Args:
        modules: by name; all but `model` and `criterion` are in the snapshot's `modules`.
        step: completed steps, for the message.
    """
    trained = [(part, n) for part, m in modules.items() for n, p in m.named_parameters() if p.requires_grad]

    def check(state: Mapping[str, Any]) -> None:
        for part, name in trained:
            weight = (state.get(part) or (state.get("modules") or {}).get(part) or {}).get(name)
            if weight is not None and not _is_finite(weight):
                raise NonFiniteLossError(
                    f"weight {name!r} of the {part} is not finite after step {step}, though no loss was: a gradient "
                    "was not. Nothing is saved, and a resume begins with the checkpoint before; lower the learning "
                    "rate, clip gradients, or set non_finite=skip"
                )

    return check


def _is_finite(weight: torch.Tensor) -> bool:
    if not weight.numel():
        return True
    values = torch.view_as_real(weight) if weight.is_complex() else weight
    return all(math.isfinite(end.item()) for end in torch.aminmax(values))
