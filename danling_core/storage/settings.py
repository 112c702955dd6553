"""Storage settings, options and retries, of this process or of one block of code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from danling_core.storage.retries import Retry


@dataclass(frozen=True)
class Settings:
    """Settings with which operations reach their store.

    Args:
        options: for the clients of stores (endpoint_url, region, project: no secrets).
        retry: how often an operation is tried, and for how long.
        is_single: an attempt is one request: the client repeats nothing by itself.
        answer_seconds: how long to wait for an answer; None: as the client has it.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    retry: Retry = field(default_factory=Retry)
    is_single: bool = False
    answer_seconds: float | None = None


_process_settings = Settings()
_block_settings: ContextVar[Settings | None] = ContextVar("danling_storage_settings", default=None)


def current() -> Settings:
    """Return the settings that an operation started here would use."""
    return _block_settings.get() or _process_settings


def configure(storage_options: Mapping[str, Any] | None = None, *, retry: Retry | None = None) -> None:
    """Set the options and the retry policy of this process; what is None stays as it is.

    Child processes do not inherit them: pass URLs and options on, and configure there too.
    """
    global _process_settings
    _process_settings = _changed(_process_settings, storage_options, retry)


@contextmanager
def prompt(answer_seconds: float) -> Iterator[None]:
    """Let an attempt be one request in this block, given up after `answer_seconds` without an answer."""
    token = _block_settings.set(replace(current(), is_single=True, answer_seconds=answer_seconds))
    try:
        yield
    finally:
        _block_settings.reset(token)


@contextmanager
def using(storage_options: Mapping[str, Any] | None = None, *, retry: Retry | None = None) -> Iterator[None]:
    """Other settings for the operations of this block, in this thread only."""
    token = _block_settings.set(_changed(current(), storage_options, retry))
    try:
        yield
    finally:
        _block_settings.reset(token)


def _changed(settings: Settings, options: Mapping[str, Any] | None, retry: Retry | None) -> Settings:
    return replace(
        settings,
        options=settings.options if options is None else dict(options),
        retry=settings.retry if retry is None else retry,
    )
