"""Checkpoints: committed or non-existent. Commit, verify, restore, prune; the background saver.

`Record` and `CheckpointStore` need no torch; `dump`, `load`, `load_state` and `BackgroundSaver` load it when
touched.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from danling_core.checkpoints.record import DataFile, Record
from danling_core.checkpoints.store import BadCheckpoint, CheckpointStore

if TYPE_CHECKING:
    from danling_core.checkpoints.codec import dump, load, load_state
    from danling_core.checkpoints.saver import BackgroundSaver

__all__ = [
    "BackgroundSaver",
    "BadCheckpoint",
    "CheckpointStore",
    "DataFile",
    "Record",
    "dump",
    "load",
    "load_state",
]

_NEEDS_TORCH = {"BackgroundSaver": "saver", "dump": "codec", "load": "codec", "load_state": "codec"}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NEEDS_TORCH[name]}"), name)
