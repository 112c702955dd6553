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
        plain[split] = _floats(metrics, split)
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


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested metrics by their path: {"task/accuracy": value}."""
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{path}/"))
        else:
            flat[path] = value
    return flat


def expanded(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Return the numbers in nested maps and lists, each with its path: `accuracy/0`. A tensor of several is a list."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, Sequence) and not isinstance(value, str):
        items = enumerate(value)
    else:
        return [(name, value)]
    return [pair for key, item in items for pair in expanded(item, f"{name}/{key}" if name else str(key))]


def history_from_json(value: Mapping[str, Any] | str) -> dict[int, Result]:
    """Return a history read back from JSON (a value or its text): keys are integers again, "NaN" is NaN again."""
    data = json.loads(value) if isinstance(value, str) else value
    return {int(index): from_json_safe(result) for index, result in data.items()}


def _floats(metrics: Mapping[str, Any], path: str) -> dict[str, Any]:
    floats: dict[str, Any] = {}
    for name, value in metrics.items():
        here = f"{path}/{name}"
        if isinstance(value, Mapping):
            floats[str(name)] = _floats(value, here)
        else:
            floats[str(name)] = _as_float(value, here)
    return floats


def _as_float(value: Any, path: str) -> float:
    if isinstance(value, str):
        if value in NON_FINITE:
            return NON_FINITE[value]
        raise ConfigError(f"metric {path!r} must be one number, got the text {value!r}")
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"metric {path!r} must be one number, got {value!r}") from error
