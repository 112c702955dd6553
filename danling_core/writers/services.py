"""Tracking services by name (W&B, MLflow): required early, made on rank 0, let go where they fail later."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from danling_core.errors import ConfigError
from danling_core.writers.protocol import Event, Writer

logger = logging.getLogger("danling.writers")


class Service(Writer, Protocol):
    """A writer that also takes single numbers."""

    def add_scalar(self, tag: str, value: float, index: int) -> None:
        """One value of a curve."""


def require(names: Iterable[str]) -> None:
    """Check that the packages of these services are installed; imports none of them.

    Raises:
        ConfigError: one is not. A folder `wandb/`, as W&B itself leaves it, is not taken for the package.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"loggers names {name!r}, and its package is not installed: pip install 'danling-flows[{name}]'"
            )


def open_service(
    name: str,
    *,
    experiment: str,
    run_id: str,
    run_name: str,
    group: str | None,
    config: Mapping[str, Any],
    log_dir: str,
) -> Service:
    """Return the writer of the service `name` for a run. Rank 0 only.

    Args:
        experiment: the project (W&B) or experiment (MLflow).
        run_id: the same after every resume, and another for every folder: the service continues its run by it.
        log_dir: a local folder for the service's own files.

    Raises:
        ConfigError: the package is not installed, or the service cannot be reached with what the environment
            says of it.
    """
    require([name])
    try:
        return _Guarded(name, _make(name, log_dir)(experiment, run_id, run_name, group, config))
    except Exception as error:
        raise ConfigError(
            f"loggers names {name!r}, and it could not be opened: {type(error).__name__}: {error} "
            f"({_HINTS[name]}; or take it out of loggers)"
        ) from error


_HINTS = {
    "wandb": "log in with `wandb login`, or set WANDB_MODE=offline",
    "mlflow": "MLFLOW_TRACKING_URI says where its server is",
}


def _make(name: str, log_dir: str) -> Callable[..., Service]:
    if name == "wandb":
        from danling_core.writers.wandb import WandbWriter

        return functools.partial(WandbWriter, log_dir=log_dir)
    from danling_core.writers.mlflow import MLflowWriter

    return MLflowWriter


class _Guarded:
    """A service whose failure after it was opened costs its curves, and no training: the folder has them all."""

    def __init__(self, name: str, service: Service) -> None:
        self._name = name
        self._service: Service | None = service

    def on_event(self, event: Event) -> None:
        """Pass it on to the service, until that has failed."""
        self._try(lambda service: service.on_event(event))

    def add_scalar(self, tag: str, value: float, index: int) -> None:
        """Pass it on to the service, until that has failed."""
        self._try(lambda service: service.add_scalar(tag, value, index))

    def flush(self) -> None:
        """Flush the service, until it has failed."""
        self._try(lambda service: service.flush())

    def close(self) -> None:
        """Close it. A second call does nothing."""
        self._try(lambda service: service.close())
        self._service = None

    def _try(self, call: Callable[[Service], None]) -> None:
        if self._service is None:
            return
        try:
            call(self._service)
        except Exception as error:
            self._service = None
            logger.warning(
                "%s gets nothing more of this run (training goes on; its folder has everything): %s: %s",
                *(self._name, type(error).__name__, error),
            )
