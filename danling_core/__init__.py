"""The PyTorch runner library. Names are loaded when first touched: importing the package loads no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from danling_core import errors as errors
    from danling_core.config import Config as Config
    from danling_core.config.sections import FreeParams as FreeParams
    from danling_core.config.sections import Params as Params
    from danling_core.errors import AccessDenied as AccessDenied
    from danling_core.errors import CheckpointCorrupt as CheckpointCorrupt
    from danling_core.errors import CheckpointError as CheckpointError
    from danling_core.errors import ConfigError as ConfigError
    from danling_core.errors import DanLingError as DanLingError
    from danling_core.errors import Fenced as Fenced
    from danling_core.errors import LaunchError as LaunchError
    from danling_core.errors import LeaseError as LeaseError
    from danling_core.errors import NonFiniteLossError as NonFiniteLossError
    from danling_core.errors import NotFound as NotFound
    from danling_core.errors import RunBusy as RunBusy
    from danling_core.errors import RunFailed as RunFailed
    from danling_core.errors import RunInterrupted as RunInterrupted
    from danling_core.errors import ScoreError as ScoreError
    from danling_core.errors import StorageError as StorageError
    from danling_core.errors import StoreUnavailable as StoreUnavailable
    from danling_core.runner import BaseRunner as BaseRunner
    from danling_core.runner import Runner as Runner
    from danling_core.runner import RunnerBase as RunnerBase
    from danling_core.runner import RunnerMode as RunnerMode
    from danling_core.runner import TorchRunner as TorchRunner

_ERRORS = (
    "AccessDenied",
    "CheckpointCorrupt",
    "CheckpointError",
    "ConfigError",
    "DanLingError",
    "Fenced",
    "LaunchError",
    "LeaseError",
    "NonFiniteLossError",
    "NotFound",
    "RunBusy",
    "RunFailed",
    "RunInterrupted",
    "ScoreError",
    "StorageError",
    "StoreUnavailable",
)
_HOMES = {
    "Config": "danling_core.config",
    "Params": "danling_core.config.sections",
    "FreeParams": "danling_core.config.sections",
    "Runner": "danling_core.runner",
    "RunnerBase": "danling_core.runner",
    "BaseRunner": "danling_core.runner",
    "TorchRunner": "danling_core.runner",
    "RunnerMode": "danling_core.runner",
    **dict.fromkeys(_ERRORS, "danling_core.errors"),
}

__all__ = [
    "AccessDenied",
    "BaseRunner",
    "CheckpointCorrupt",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DanLingError",
    "Fenced",
    "FreeParams",
    "LaunchError",
    "LeaseError",
    "NonFiniteLossError",
    "NotFound",
    "Params",
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
    if name == "errors":
        return import_module("danling_core.errors")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'danling_core' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
