"""Checks that need the run's own code, made before anything is created."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any

from danling_core.config import Config
from danling_core.errors import ConfigError
from danling_core.identity.ids import callback_files, experiment_id_of, stores
from danling_core.identity.sources import loaded_sources
from danling_core.parallel import accelerators, distributed
from danling_core.runner.resolve import callback_classes, check_named, import_runner, resolve
from danling_core.runner.torch_runner import TorchRunner
from danling_core.writers.services import require


def prepare(config: Mapping[str, Any], cwd: str) -> dict[str, Any]:
    """Everything about a run that only its code can tell: the full config, the experiment id, the world.

    Called in a process of its own, whose folder `cwd` is, since it runs the user's module. Nothing is created.

    Raises:
        ConfigError: anything about config, params or the named classes that would not work.
    """
    resolved, facts = _prepared(config)
    ranks = ranks_per_node(resolved)
    device = distributed.resolve_device(resolved.device, ranks).type
    gpus = 0 if device == "cpu" else accelerators.count(device)
    return {**facts, "world_size": ranks, "device": device, "gpus": gpus}


def prepare_elsewhere(config: Mapping[str, Any], cwd: str) -> dict[str, Any]:
    """Do what `prepare` does for a run that another machine trains, whose GPUs are not known here."""
    resolved, facts = _prepared(config)
    ranks = 1 if resolved.nproc_per_node == "auto" else int(resolved.nproc_per_node)
    return {**facts, "world_size": ranks, "device": "cpu", "gpus": 0}


def _prepared(config: Mapping[str, Any]) -> tuple[Config, dict[str, Any]]:
    """Return the full config, and what is the same on every machine."""
    stated = Config.load(config)
    if stated.nnodes > 1:
        raise ConfigError(
            f"nnodes is {stated.nnodes}, and a flow launches on its own node only: on every node start "
            f"torchrun --nnodes {stated.nnodes} --nproc-per-node N --rdzv-backend c10d "
            "--rdzv-endpoint HOST:29500 -m danling_core.worker CONFIG, and project_root where all see it"
        )
    resolved, _, source = pin(stated)
    return resolved, {
        "config": resolved.dict(),
        "experiment_id": resolved.experiment_id,
        "source_file": source,
        "sources": loaded_sources() if stated.experiment_id is None else {},
    }


def pin(config: Config) -> tuple[Config, type[TorchRunner], str | None]:
    """Return the full config with its experiment id stated, the runner's class, and the class's file."""
    resolved, cls = load_runner(config)
    source = getattr(sys.modules.get(cls.__module__), "__file__", None)
    experiment_id = resolved.experiment_id or _experiment_id(
        source, tuple(stores(resolved)), tuple(callback_files(resolved))
    )
    return resolved.model_copy(update={"experiment_id": experiment_id}), cls, source


@functools.cache
def _experiment_id(source: str | None, exclude: tuple[str, ...], others: tuple[str, ...]) -> str:
    """Return what the first question found: each config of a sweep would have git read the whole tree again."""
    return experiment_id_of(source, exclude, others)


def load_runner(config: Config) -> tuple[Config, type[TorchRunner]]:
    """Return the runner's class, and the config completed by the class's params. Runs the user's module."""
    if config.runner is None:
        raise ConfigError(
            "runner is missing: name your class as 'package.module:Class' or 'path/to/file.py:Class'"
        )
    cls = import_runner(config.runner)
    if not issubclass(cls, TorchRunner):
        raise ConfigError(
            f"runner {config.runner!r} is a {cls.__mro__[1].__name__}, not a danling_core.TorchRunner"
        )
    require(config.loggers)
    callback_classes(config)
    check_named(config)
    return resolve(cls, config)[0], cls


def ranks_per_node(config: Config) -> int:
    """Return `nproc_per_node`, where `auto` means the GPUs that will be used, else 1."""
    if config.nproc_per_node != "auto":
        return int(config.nproc_per_node)
    kind = None if config.device == "cpu" else accelerators.kind_here()
    return 1 if kind is None else max(accelerators.count(kind), 1)
