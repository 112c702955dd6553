"""The PyTorch runner library. Config and runners are loaded when first touched: the import loads no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from danling_core import errors
from danling_core.errors import (
    AccessDenied,
    CallbackError,
    CheckpointCorrupt,
    CheckpointError,
    ConfigError,
    DanLingError,
    DataError,
    Fenced,
    LaunchError,
    LeaseError,
    NonFiniteLossError,
    NotFound,
    RanksDiffer,
    RunBusy,
    RunFailed,
    RunInterrupted,
    ScoreError,
    StorageError,
    StoreUnavailable,
)

if TYPE_CHECKING:
    from danling_core.callbacks import Callback
    from danling_core.config import Config, FreeParams, Params
    from danling_core.runner import BaseRunner, Runner, RunnerBase, RunnerMode, TorchRunner

_LAZY = {
    "Callback": "danling_core.callbacks",
    **dict.fromkeys(("Config", "FreeParams", "Params"), "danling_core.config"),
    **dict.fromkeys(
        ("BaseRunner", "Runner", "RunnerBase", "RunnerMode", "TorchRunner"), "danling_core.runner"
    ),
}

__all__ = [
    "AccessDenied",
    "BaseRunner",
    "Callback",
    "CallbackError",
    "CheckpointCorrupt",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DanLingError",
    "DataError",
    "Fenced",
    "FreeParams",
    "LaunchError",
    "LeaseError",
    "NonFiniteLossError",
    "NotFound",
    "Params",
    "RanksDiffer",
    "RunBusy",
    "RunFailed",
    "RunInterrupted",
    "Runner",
    "RunnerBase",
    "RunnerMode",
    "ScoreError",
    "StorageError",
    "StoreUnavailable",
    "TorchRunner",
    "errors",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'danling_core' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
