"""Remembers, on this machine, the status of complete remote runs: listing them again reads little."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence

from danling_core import storage
from danling_core.errors import StorageError

logger = logging.getLogger("danling")


def read_statuses(root_url: str, entries: Mapping[str, storage.Entry]) -> dict[str, bytes | None]:
    """Return the content of every status file; from the cache where size and time are those of a complete one.

    Args:
        root_url: the project root; each has a cache file of its own.
        entries: the status files as listed just now, by URL.
    """
    path = _cache_path(root_url)
    known = _load(path)
    found: dict[str, bytes | None] = {}
    for url, entry in entries.items():
        size, mtime, text = known.get(url, (None, None, ""))
        if (size, mtime) == (entry.size, entry.mtime):
            found[url] = text.encode()
    unknown = [url for url in entries if url not in found]
    found.update(zip(unknown, storage.read_many(unknown), strict=True))
    if unknown or len(known) > len(entries):
        _save(path, entries, found)
    return found


def _cache_path(root_url: str) -> str:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.sha256(root_url.rstrip("/").encode()).hexdigest()[:16]
    return os.path.join(home, "danling", f"runs-{digest}.json")


def _load(path: str) -> dict[str, tuple[int, float, str]]:
    try:
        with open(path, encoding="utf-8") as file:
            return {url: (size, mtime, text) for url, (size, mtime, text) in json.load(file).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        logger.debug("the cache %s is not used: %s", path, error)
        return {}


def _save(path: str, entries: Mapping[str, storage.Entry], contents: Mapping[str, bytes | None]) -> None:
    kept: dict[str, Sequence[object]] = {}
    for url, data in contents.items():
        if data is not None and _is_complete(data) and len(data) == entries[url].size:
            kept[url] = (entries[url].size, entries[url].mtime, data.decode())
    try:
        storage.write_bytes(path, json.dumps(kept).encode(), is_durable=False)
    except StorageError as error:  # a read-only home: slower, not wrong
        logger.debug("the cache %s is not written: %s", path, error)


def _is_complete(data: bytes) -> bool:
    """Only these do not change any more while their size and time stay the same."""
    try:
        data.decode()
        return bool(storage.parse_json_object(data, "a status").get("status") == "complete")
    except (StorageError, UnicodeDecodeError):
        return False
