"""Runners: `RunnerBase` declares, `BaseRunner` drives, `TorchRunner` trains. Its touch loads torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from danling_core.runner.base import RunnerBase, RunnerMode
    from danling_core.runner.base_runner import BaseRunner
    from danling_core.runner.torch_runner import TorchRunner
    from danling_core.runner.torch_runner import TorchRunner as Runner

__all__ = ["BaseRunner", "Runner", "RunnerBase", "RunnerMode", "TorchRunner"]
_HOMES = {"RunnerBase": "base", "RunnerMode": "base", "BaseRunner": "base_runner"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOMES.get(name, 'torch_runner')}")
    return getattr(module, "TorchRunner" if name == "Runner" else name)
