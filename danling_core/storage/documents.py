"""JSON documents at URLs: always valid JSON, also with NaN in them."""

from __future__ import annotations

import json
from typing import Any

from danling_core.errors import StorageError
from danling_core.secrets import redact
from danling_core.storage import json_safe
from danling_core.storage.operations import Guard, read_bytes, write_bytes


def to_json(value: Any, indent: int | None = 2) -> str:
    """Valid JSON text: NaN and the infinities become the strings "NaN", "Infinity", "-Infinity"."""
    return json_safe.dumps(value, indent=indent, ensure_ascii=False)


def read_json(url: str) -> Any:
    """Return the document. Raises `NotFound`, or `StorageError` where the bytes are no JSON."""
    data = read_bytes(url)
    try:
        return json.loads(data)
    except ValueError as error:
        raise StorageError(f"{redact(url)!r} holds {len(data)} bytes that are not JSON: {error}") from error


def write_json(url: str, value: Any, *, is_durable: bool = True, guard: Guard | None = None) -> None:
    """Write `to_json(value)` whole. `is_durable` and `guard` as in `write_bytes`."""
    write_bytes(url, (to_json(value) + "\n").encode(), is_durable=is_durable, guard=guard)
