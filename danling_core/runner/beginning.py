"""Beginning of a new run with the weights or the whole state of another one, where the config says so."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from danling_core.config import Config
from danling_core.errors import CheckpointError, ConfigError, StorageError
from danling_core.runner.loading import LoadedKeys, whole_state

logger = logging.getLogger("danling")
_SHOWN = 5


class Loads(Protocol):
    """Method of a runner that loads weights."""

    def load_pretrained(self, checkpoint: str, strict: bool = True) -> LoadedKeys: ...


def begin(
    config: Config, runner: Loads, apply: Callable[[Mapping[str, Any]], None], *, is_main: bool
) -> dict[str, Any] | None:
    """Take over what the config says that a new run begins with; return what that was. Collective.

    Args:
        apply: takes over a whole state.

    Raises:
        ConfigError: it is not there, or does not fit.
    """
    if config.checkpoint is not None:
        with _explained("checkpoint", config.checkpoint):
            apply(whole_state(config.checkpoint))
        return {"checkpoint": config.checkpoint}
    if config.pretrained is None:
        return None
    stated = config.pretrained
    with _explained("pretrained", stated.path):
        keys = runner.load_pretrained(stated.path, stated.strict)
    if is_main:
        logger.info(
            "begins with the weights of %s%s%s",
            *(stated.path, _told("; not in it", keys.missing), _told("; left out of it", keys.unexpected)),
        )
    return {"pretrained": stated.path, "missing": keys.missing, "unexpected": keys.unexpected}


def _told(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what}: {', '.join(names[:_SHOWN])}{more}" if names else ""


@contextlib.contextmanager
def _explained(key: str, url: str) -> Iterator[None]:
    """Raise what goes wrong as a ConfigError that names the key and the place."""
    try:
        yield
    except (CheckpointError, ConfigError, StorageError) as error:
        raise ConfigError(f"{key} is {url}: {error}") from error
