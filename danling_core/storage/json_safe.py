"""Valid JSON out of what experiments report: NaN and infinity by name, scalars of any library as numbers."""

from __future__ import annotations

import datetime
import enum
import json
import math
import os
from collections.abc import Mapping
from typing import Any

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json_safe(value: Any) -> Any:
    """Return a copy of `value` made of what JSON has: dict, list, str, int, finite float, bool, None.

    NaN and infinities become the strings "NaN", "Infinity", "-Infinity"; NumPy scalars and tensors of one
    element become numbers; paths, dates and enum members their text. Keys become strings where JSON would
    make them so.

    Raises:
        TypeError: for anything else, naming its type.
    """
    if isinstance(value, enum.Enum):
        return to_json_safe(value.value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _name_of(value)
    if isinstance(value, Mapping):
        return {_key(key): to_json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json_safe(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if getattr(value, "size", None) == 1 or getattr(value, "numel", lambda: 0)() == 1:
        return to_json_safe(value.item())
    raise TypeError(
        f"a {type(value).__qualname__} cannot be written as JSON; give numbers, text, lists or mappings"
    )


def from_json_safe(value: Any) -> Any:
    """Return the reverse for numbers: wherever "NaN", "Infinity", "-Infinity" stand, they become floats again."""
    if isinstance(value, str):
        return NON_FINITE.get(value, value)
    if isinstance(value, Mapping):
        return {key: from_json_safe(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json_safe(item) for item in value]
    return value


def dumps(value: Any, **options: Any) -> str:
    """Return valid JSON, whatever the value. `options` are those of `json.dumps`."""
    return json.dumps(to_json_safe(value), allow_nan=False, **options)


def _name_of(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _key(key: Any) -> str:
    if isinstance(key, str):
        return key
    if key is None or isinstance(key, (bool, int, float)):
        return str(json.dumps(key))
    raise TypeError(f"a {type(key).__qualname__} cannot be a JSON key: {key!r}; give text or numbers")
