"""Runners: `RunnerBase` declares, `BaseRunner` drives, `TorchRunner` trains; torch is loaded when it is
touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from danling_core.runner.base import RunnerBase, RunnerMode
    from danling_core.runner.base_runner import BaseRunner
    from danling_core.runner.torch_runner import TorchRunner
    from danling_core.runner.torch_runner import TorchRunner as Runner

__all__ = ["BaseRunner", "Runner", "RunnerBase", "RunnerMode", "TorchRunner"]


def __getattr__(name: str) -> Any:
    if name in ("RunnerBase", "RunnerMode"):
        from danling_core.runner import base

        return getattr(base, name)
    if name == "BaseRunner":
        from danling_core.runner.base_runner import BaseRunner

        return BaseRunner
    if name in ("Runner", "TorchRunner"):
        from danling_core.runner.torch_runner import TorchRunner

        return TorchRunner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
