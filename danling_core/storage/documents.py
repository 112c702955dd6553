"""JSON documents at URLs: valid JSON when written, also with NaN in them; read as what anyone may have written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from danling_core.errors import StorageError
from danling_core.secrets import redact
from danling_core.storage import json_safe
from danling_core.storage.operations import Guard, read_bytes, write_bytes

DOCUMENT_BYTES = 64 << 20
"""More than any document of a run has: larger ones are refused unread."""
_MAX_DEPTH = 100


def to_json(value: Any, indent: int | None = 2) -> str:
    """Valid JSON text: NaN and the infinities become the strings "NaN", "Infinity", "-Infinity"."""
    return json_safe.dumps(value, indent=indent, ensure_ascii=False)


def read_json(url: str) -> Any:
    """Return the document. Raises `NotFound`, or `StorageError` where the bytes are no JSON."""
    return parse_json(read_bytes(url, DOCUMENT_BYTES), url)


def read_json_object(url: str) -> dict[str, Any]:
    """Return the document, an object. Raises `NotFound`, or `StorageError` where it is something else."""
    return parse_json_object(read_bytes(url, DOCUMENT_BYTES), url)


def parse_json(data: bytes, url: str) -> Any:
    """Return the JSON document in bytes that were read at `url`. Raises `StorageError`, which names the URL."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise StorageError(f"{redact(url)!r} is nested too deeply to be read") from None
    except ValueError as error:
        raise StorageError(f"{redact(url)!r} holds {len(data)} bytes that are not JSON: {error}") from error
    if data.count(b"[") + data.count(b"{") > _MAX_DEPTH and _is_deep(value):
        raise StorageError(f"{redact(url)!r} is nested too deeply to be read")
    return value


def parse_json_object(data: bytes, url: str) -> dict[str, Any]:
    """Return the JSON object in bytes that were read at `url`. Raises `StorageError`, which names the URL."""
    value = parse_json(data, url)
    if not isinstance(value, dict):
        raise StorageError(f"{redact(url)!r} holds a {type(value).__name__}, wanted an object")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        children = value.values() if isinstance(value, dict) else value
        yield from (child for child in children if isinstance(child, dict | list))


def write_json(url: str, value: Any, *, is_durable: bool = True, guard: Guard | None = None) -> None:
    """Write `to_json(value)` whole. `is_durable` and `guard` as in `write_bytes`."""
    write_bytes(url, (to_json(value) + "\n").encode(), is_durable=is_durable, guard=guard)
