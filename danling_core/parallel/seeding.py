"""Seeds, determinism, and the capture of every random number generator of a rank."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch

from danling_core.parallel import accelerators

_MAX_NUMPY_SEED = 2**32


def seed_everything(seed: int) -> int:
    """Seed Python, NumPy, torch and CUDA of this process; returns the seed."""
    random.seed(seed)
    np.random.seed(seed % _MAX_NUMPY_SEED)
    torch.manual_seed(seed)  # seeds CUDA too, lazily
    return seed


def set_deterministic() -> None:
    """Ask torch for deterministic algorithms; an operation without one raises when it is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)


def capture_rng() -> dict[str, Any]:
    """State of every generator of this rank, in types that `weights_only` loading accepts."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {
            "name": name,
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gaussian": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    return {**state, **accelerators.generator_states()}


def restore_rng(state: dict[str, Any]) -> None:
    """Put back what `capture_rng` took, on this rank."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = state["numpy"]
    np.random.set_state(
        (
            numpy_state["name"],
            numpy_state["keys"].numpy().astype(np.uint32),
            numpy_state["position"],
            numpy_state["has_gauss"],
            numpy_state["cached_gaussian"],
        )
    )
    torch.set_rng_state(state["torch"].cpu())
    accelerators.restore_generators(state)


class Generators:
    """The random number generators of this rank, as a checkpoint holds them."""

    def __init__(self) -> None:
        self._held: dict[str, Any] | None = None

    def hold(self) -> None:
        """Have `state` be the one of now: an evaluation begins, which a resume would repeat from here."""
        self._held = capture_rng()

    def release(self) -> None:
        """End what `hold` began."""
        self._held = None

    def state(self) -> dict[str, Any]:
        """Return the state to save."""
        return self._held or capture_rng()
