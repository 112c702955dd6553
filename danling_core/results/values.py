"""The shape of a result: {split: {metric: value}} in plain floats; merged, flattened, read back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from danling_core.errors import ConfigError
from danling_core.storage.json_safe import NON_FINITE, from_json_safe

Result = dict[str, dict[str, Any]]
"""{split: {metric: value}}; a value is a float, or a mapping of them for multi-task metrics."""


def plain_result(result: Mapping[str, Any]) -> Result:
    """Return a copy of `result` whose values are floats: each is converted once, which waits for a tensor on a GPU.

    Raises:
        ConfigError: where it is not {split: {metric: number}}, naming the place.
    """
    if not isinstance(result, Mapping):
        raise ConfigError(f"a result is {{split: {{metric: value}}}}, got a {type(result).__name__}")
    plain: Result = {}
    for split, metrics in result.items():
        if not isinstance(split, str) or not isinstance(metrics, Mapping):
            raise ConfigError(f"a result is {{split: {{metric: value}}}}, got {split!r}: {metrics!r}")
        if split == "index":
            raise ConfigError(
                "a split cannot be called 'index': `latest_result` and `best_result` use that key"
            )
        plain[split] = as_floats(metrics, split)
    return plain


def merge(base: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    """Return a new nested dictionary: `base`, with what `added` gives in place of or beside it."""
    merged = {name: merge(value, {}) if isinstance(value, Mapping) else value for name, value in base.items()}
    for name, value in added.items():
        below = merged.get(name)
        if isinstance(value, Mapping):
            merged[name] = merge(below if isinstance(below, Mapping) else {}, value)
        else:
            merged[name] = value
    return merged


def flatten(values: Mapping[str, Any], prefix: str = "", *, splits_vectors: bool = True) -> dict[str, Any]:
    """Return nested values by their path: {"task/accuracy": value, "recall/0": value}.

    Args:
        splits_vectors: whether lists and arrays are taken apart, too.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        parts = parts_of(value) if splits_vectors or isinstance(value, Mapping) else None
        if parts is None:
            flat[path] = value
        else:
            flat.update(flatten(parts, f"{path}/", splits_vectors=splits_vectors))
    return flat


def parts_of(value: Any) -> dict[str, Any] | None:
    """Return the items of a mapping, list, array or tensor by name or position; None for a single number.

    A value for each class is reported as `recall/0`, `recall/1`, ... everywhere.
    """
    if isinstance(value, Mapping):
        return {str(name): item for name, item in value.items()}
    if getattr(value, "ndim", 0) and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return {str(index): item for index, item in enumerate(value)}
    return None


def as_floats(value: Any, path: str) -> Any:
    """Return a number as a float, and a vector or mapping of them as a mapping of floats.

    Raises:
        ConfigError: something in it is no number; the message has its path.
    """
    parts = parts_of(value)
    if parts is None:
        return _as_float(value, path)
    return {name: as_floats(item, f"{path}/{name}") for name, item in parts.items()}


def history_from_json(value: Mapping[str, Any] | str) -> dict[int, Result]:
    """Return a history read back from JSON (a value or its text): keys are integers again, "NaN" is NaN again."""
    data = json.loads(value) if isinstance(value, str) else value
    return {int(index): from_json_safe(result) for index, result in data.items()}


def _as_float(value: Any, path: str) -> float:
    if isinstance(value, str):
        if value in NON_FINITE:
            return NON_FINITE[value]
        raise ConfigError(f"metric {path!r} must be one number, got the text {value!r}")
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"metric {path!r} must be one number, got {value!r}") from error
