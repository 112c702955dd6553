"""Dotted overrides and sweeps on raw mappings: `params.lr=0.01`, grids, lists of runs, and names for them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Protocol, TypeAlias

from danling_core.config.documents import canonical_json, parse_scalar, parse_yaml
from danling_core.errors import ConfigError

Overrides: TypeAlias = Sequence[str] | Mapping[str, Any]

_NAME_BYTES = 100
_UNNAMED = frozenset({"run_name", "experiment_name", "name", "group"})


class Swept(Protocol):
    """Input of `expand`: a grid of values, or a list of runs, or neither."""

    @property
    def sweep(self) -> Mapping[str, Any] | None: ...

    @property
    def runs(self) -> Sequence[Mapping[str, Any]] | None: ...


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """Return `"a.b=1e-3"` as `(("a", "b"), 0.001)`.

    The value is read as YAML reads it after a key. Only `[`, `{` and quotes open a structure, so that `#fff`
    and `a: b` stay text. ConfigError (which does not repeat the value) when there is no key or no `=`.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"override {key.strip()!r}: wanted key=value, found no '='")
    return split_key(key), _value(key, value.strip())


def _value(key: str, text: str) -> Any:
    if text[:1] in {"[", "{", "'", '"'}:
        return parse_yaml(text, f"override {key.strip()!r}")
    return parse_scalar(text)


def split_key(key: str) -> tuple[str, ...]:
    """Return `"a.b"` as `("a", "b")`; ConfigError when a part is empty."""
    path = tuple(part.strip() for part in key.split("."))
    if not all(path):
        raise ConfigError(f"override {key.strip()!r}: wanted a dotted key such as 'optim.lr'")
    return path


def apply(values: Mapping[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Return a new mapping with `overrides` applied in order; `values` is left as it is.

    Keys may be dotted. A mapping given as a value is merged into the section that is there; anything else
    replaces what is there.

    Raises:
        ConfigError: a key leads through something that is not a section.
    """
    result = _copy(values)
    for path, value in _pairs(overrides):
        _set(result, path, value)
    return result


def grid(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the listed values, as dotted overrides; the last key varies fastest.

    `{"optim.lr": [1e-3, 3e-3], "seed": [0, 1]}` gives four. Nested mappings are read as dotted keys.
    """
    axes = _flatten(sweep)
    for key, values in axes.items():
        if not isinstance(values, (list, tuple)) or not values:
            raise ConfigError(f"sweep {key!r}: wanted a list of one or more values to try")
    return [dict(zip(axes, combination, strict=True)) for combination in product(*axes.values())]


def parse_sweep(words: Sequence[str]) -> dict[str, list[Any]]:
    """Return `["params.lr=1e-3,3e-3", "seed=0,1"]` as a grid's `{"params.lr": [0.001, 0.003], "seed": [0, 1]}`.

    Each value is read as `parse_override` reads it: `a: b` and `#fff` are text, and a comma inside brackets or quotes
    parts nothing.
    """
    sweep: dict[str, list[Any]] = {}
    for word in words:
        key, equals, values = word.partition("=")
        if not equals:
            parse_override(key)
        path = ".".join(split_key(key))
        if path in sweep:
            raise ConfigError(f"--sweep: {key!r} is given twice; list its values as {key}=1,2,3")
        sweep[path] = [_value(key, text) for text in _split(key, values)]
    return sweep


def _split(key: str, text: str) -> list[str]:
    """Return the parts between commas that are in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and not parts[-1].strip(" [{,:"):
            quote = character
        elif character in "[{" and (depth or not parts[-1].strip()):
            depth += 1
        elif character in "]}" and depth:
            depth -= 1
        elif character == "," and not depth:
            parts.append("")
            continue
        parts[-1] += character
    parts = [part.strip() for part in parts]
    if len(parts) > 1 and not parts[-1]:
        parts.pop()
    if not all(parts):
        raise ConfigError(f"--sweep {key.strip()!r}: wanted a value before and after each comma")
    return parts


def expand(experiment: Swept) -> list[dict[str, Any]]:
    """Return the dotted overrides of each run; one empty dict where the experiment neither sweeps nor lists runs."""
    if experiment.sweep is not None and experiment.runs is not None:
        raise ConfigError("sweep and runs are both given: a grid or a list, not both")
    if experiment.sweep is not None:
        return grid(experiment.sweep)
    return [{}] if experiment.runs is None else [_flatten(run) for run in experiment.runs]


def run_names(base: str, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a name for each run, as `base-lr=0.001-seed=0`: unique, at most 100 bytes, safe as a folder's name.

    A run whose overrides give a `run_name` keeps it. A key is shortened to its last part where that is clear.
    """
    keys = {key for run in runs for key in run if key not in _UNNAMED}
    last_parts = [key.rpartition(".")[2] for key in keys]
    short = {key: last if last_parts.count(last := key.rpartition(".")[2]) == 1 else key for key in keys}
    names: list[str] = []
    for run in runs:
        parts = [f"{short[key]}={_shown(value)}" for key, value in run.items() if key in short]
        name = _shorten(str(run["run_name"]) if "run_name" in run else "-".join([base, *parts]))
        names.append(_unique(name, names))
    return names


def _pairs(overrides: Overrides) -> list[tuple[tuple[str, ...], Any]]:
    if isinstance(overrides, str):
        raise ConfigError("overrides: wanted a list of 'key=value' or a mapping, found text")
    if isinstance(overrides, Mapping):
        return [(split_key(str(key)), value) for key, value in overrides.items()]
    for text in overrides:
        if not isinstance(text, str):
            raise ConfigError(
                f"overrides: in a list wanted 'key=value', found a {type(text).__name__}; or write a mapping, "
                "as {params.lr: 0.01}"
            )
    return [parse_override(text) for text in overrides]


def _set(section: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for depth, part in enumerate(path[:-1], start=1):
        inner = section.get(part)
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {'.'.join(path)!r}: {'.'.join(path[:depth])!r} is not a section")
        section = inner
    _merge(section, path[-1], value)


def _merge(section: dict[str, Any], key: str, value: Any) -> None:
    there = section.get(key)
    if isinstance(value, Mapping) and isinstance(there, dict):
        for inner, item in value.items():
            _merge(there, inner, item)
    else:
        section[key] = _copy(value)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        inner = _flatten(value, f"{dotted}.") if isinstance(value, Mapping) and value else {dotted: value}
        for name in inner:
            if name in flat:
                raise ConfigError(f"{name!r} is given twice, dotted and nested")
        flat.update(inner)
    return flat


def _shown(value: Any) -> str:
    if isinstance(value, str):
        text = value
    elif isinstance(value, float):
        text = repr(value)
    else:
        text = canonical_json(value)
    return re.sub(r"[^\w.,+=-]+", "_", text.replace('"', "")).strip("_") or "_"


def _shorten(name: str) -> str:
    if len(name.encode()) <= _NAME_BYTES:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name.encode()[: _NAME_BYTES - 9].decode(errors='ignore')}-{digest}"


def _unique(name: str, taken: Sequence[str]) -> str:
    if name not in taken:
        return name
    number = next(n for n in range(2, len(taken) + 3) if f"{name[:90]}-{n}" not in taken)
    return f"{name[:90]}-{number}"
