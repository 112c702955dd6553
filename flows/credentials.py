"""A store's credentials in the environment while flows run: the launcher, its ranks and the mirror inherit them."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from danling_core import storage
from danling_core.config import Config
from danling_core.config.storage_block import LOADED, is_on_store
from danling_core.errors import ConfigError
from flows.blocks import read_block

_GOOGLE_FILE = "GOOGLE_APPLICATION_CREDENTIALS"


@dataclass
class _Loaded:
    """A block in use: how often, the environment from before it, and the file of its key."""

    name: str
    users: int
    before: dict[str, str | None]
    file: str | None


_loaded: _Loaded | None = None
_lock = threading.Lock()


@contextlib.contextmanager
def store_credentials(configs: Sequence[Config]) -> Iterator[None]:
    """Inside, the environment holds what the configs' `storage_block` says; without one it stays as it is.

    To be entered before a launcher is started and before a store is read. May be nested, and entered by several
    threads, for the same block: it is read once, and the environment is put back after the last.

    Raises:
        ConfigError: the block, its package or the server is not there, or two blocks are wanted at a time.
    """
    name = named_block(configs)
    if name is None:
        yield
        return
    _enter(name)
    try:
        yield
    finally:
        _leave()


def named_block(configs: Sequence[Config]) -> str | None:
    """Return the block that the configs name; all that keep their run on a store must agree on it, or ConfigError."""
    names = {
        config.storage_block for config in configs if config.storage_block is not None or is_on_store(config)
    }
    if len(names) > 1:
        shown = " and ".join(sorted(str(name or "none") for name in names))
        raise ConfigError(
            f"wanted one storage_block for all runs of a command, found {shown}: train them apart"
        )
    return next(iter(names), None)


def forget() -> None:
    """Remove the file of a key: for an end of the process that leaves no `with`."""
    if _loaded is not None and _loaded.file is not None:
        with contextlib.suppress(FileNotFoundError):
            os.remove(_loaded.file)


def _enter(name: str) -> None:
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = _load(name)
            storage.reconnect()
        elif _loaded.name != name:
            raise ConfigError(
                f"storage_block {name!r} is wanted while {_loaded.name!r} is in use: a process has one at a time"
            )
        _loaded.users += 1


def _leave() -> None:
    global _loaded
    with _lock:
        assert _loaded is not None
        _loaded.users -= 1
        if _loaded.users:
            return
        _set(_loaded.before)
        forget()
        _loaded = None
        storage.reconnect()


def _load(name: str) -> _Loaded:
    found = read_block(name)
    variables = {**found.variables, LOADED: name}
    file = None
    if found.key is not None:
        # Readable by its owner only.
        descriptor, file = tempfile.mkstemp(prefix="danling-google-", suffix=".json")
        with open(descriptor, "w") as stream:
            json.dump(found.key, stream)
        variables[_GOOGLE_FILE] = file
    before = {variable: os.environ.get(variable) for variable in variables}
    _set(variables)
    return _Loaded(name, 0, before, file)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
