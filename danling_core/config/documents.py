"""YAML and JSON text that comes back exactly as it went out, and errors that name the line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, ScalarNode

from danling_core.errors import ConfigError

_MAX_DEPTH = 50
_MAX_VALUES = 1_000_000
_MAX_BYTES = 16 << 20
_MAX_MERGED = 10_000
_TOO_DEEP = f"wanted at most {_MAX_DEPTH} levels of nesting"
_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")


class YamlLoader(yaml.SafeLoader):
    """Plain scalars as in YAML 1.2: `1e-3` is a number; `yes` and `1:30` are text. No key comes twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """Return a mapping as it is written, merges not yet resolved: there a key that comes twice is an error."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                continue
            if (key.tag, key.value) in lines:
                problem = f"key {key.value!r} is given twice (first on line {lines[key.tag, key.value]})"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            lines[key.tag, key.value] = key.start_mark.line + 1
        assert isinstance(node, MappingNode)
        return node

    def flatten_mapping(self, node: MappingNode) -> None:
        """Write out merges (`<<`), which may multiply at each level. Raises ConstructorError for too many keys."""
        super().flatten_mapping(node)
        if len(node.value) > _MAX_MERGED:
            raise yaml.constructor.ConstructorError(None, None, "too many merged keys", node.start_mark)


class YamlDumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 readers could take for something else; writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _construct_int(loader: yaml.SafeLoader, node: ScalarNode) -> int:
    text = node.value
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


for _name, _pattern, _first in [
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("merge", re.compile(r"^<<$"), "<"),
]:
    YamlLoader.add_implicit_resolver(_TAG + _name, _pattern, list(_first))
YamlLoader.add_constructor(_TAG + "int", _construct_int)
YamlDumper.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
YamlDumper.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, label: str = "YAML") -> Any:
    """Return the value of one YAML document. ConfigError names `label` and the line, and never quotes the text."""
    try:
        return _refuse_deep(yaml.load(text, Loader=YamlLoader), label)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ConfigError(f"{label}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        number = text[: error.position].count("\n") + 1
        raise ConfigError(f"{label}, line {number}: not valid YAML: {error.reason}") from None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{label}: not valid YAML: {type(error).__name__}") from None


def parse_scalar(text: str) -> Any:
    """One plain value as YAML reads it: `1e-3` a float, `true` a bool, `null` None, anything else text."""
    text = text.strip()
    loader = YamlLoader("")
    try:
        tag = loader.resolve(ScalarNode, text, (True, False))
        return text if tag == _TAG + "merge" else loader.construct_object(ScalarNode(tag, text), deep=True)
    except ValueError:
        raise ConfigError("wanted a value that can be read, found a number of too many digits") from None
    finally:
        loader.dispose()


def dump_yaml(value: Mapping[str, Any]) -> str:
    """YAML text in the mapping's own order, that `parse_yaml` turns back into an equal mapping."""
    text: str = yaml.dump(
        value, Dumper=YamlDumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=10**6
    )
    return text


def parse_json(text: str, label: str = "JSON") -> Any:
    """Return the value of one JSON document. ConfigError names `label` and the line, and never quotes the text."""
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _no_duplicates(pairs, label))
        return _refuse_deep(value, label)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{label}, line {error.lineno}: not valid JSON: {error.msg}") from None
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{label}: not valid JSON: {type(error).__name__}") from None


def dump_json(value: Mapping[str, Any], indent: int | None = 2) -> str:
    """JSON text in the mapping's own order. The values are finite, so it is valid JSON."""
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: keys sorted, no spaces, ASCII, floats by their shortest exact `repr`."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def read_mapping(location: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON (`.json`) file, local or at a URL. Every failure is one ConfigError."""
    location = str(location)
    text = read_text(location)
    value = parse_json(text, location) if location.endswith(".json") else parse_yaml(text, location)
    return as_mapping(value, location)


def read_text(location: str) -> str:
    """Return UTF-8 text of a local file, or of anything storage can read."""
    try:
        return decode(_read_bytes(location), location)
    except OSError as error:
        raise ConfigError(f"{location}: cannot be read: {error.strerror or error}") from error


def decode(data: bytes, location: str) -> str:
    """Return UTF-8 text that was read at a location, which the ConfigError for other bytes names."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{location}: wanted UTF-8 text, found other bytes at offset {error.start}"
        ) from None


def write_text(location: str | Path, text: str) -> None:
    """Write UTF-8 text to a local file (its folder must exist) or to anything storage can write."""
    if "://" in str(location):
        from danling_core import storage

        storage.write_bytes(str(location), text.encode())
    else:
        Path(location).write_text(text, encoding="utf-8", newline="\n")


def as_mapping(value: Any, label: str) -> dict[str, Any]:
    """Return `value` if it is a mapping with text keys, else a ConfigError that says what it is."""
    if value is None:
        raise ConfigError(f"{label}: wanted a mapping of keys, found nothing (empty)")
    if not isinstance(value, Mapping):
        raise ConfigError(f"{label}: wanted a mapping of keys, found a {type(value).__name__}")
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"{label}: wanted text as a key, found {key!r} (put it in quotes)")
    return dict(value)


def plain(value: Any, at: str = "", depth: int = 0) -> Any:
    """Return a copy of `value` in what YAML and JSON carry exactly: None, bool, int, finite float, str, list, dict.

    Tuples become lists. Raises ValueError for anything else, with its place (`at` and below) in the message.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(_TOO_DEEP)
    if isinstance(value, Mapping):
        keys = {_plain_key(key): f"{at}.{key}" if at else str(key) for key in value}
        return {key: plain(value[key], place, depth + 1) for key, place in keys.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return [plain(item, f"{at}[{index}]", depth + 1) for index, item in enumerate(value)]
    problem = _problem(value)
    if problem is not None:
        raise ValueError(f"at {at!r}, {problem}" if at else problem)
    return value


def _problem(value: Any) -> str | None:
    if value is not None and type(value) not in (bool, int, float, str):
        return (
            f"wanted null, true, false, a number, text, a list or a mapping, found a {type(value).__name__}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        return f"wanted a finite number, found {value} (JSON has none; give it as text: '{value}')"
    if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
        return "wanted Unicode text, found a lone surrogate"
    return None


def _plain_key(key: object) -> str:
    if not isinstance(key, str):
        raise ValueError(f"wanted text as a key, found {key!r} (put it in quotes)")
    return key


def _refuse_deep(value: Any, label: str) -> Any:
    """Return the value itself.

    Raises:
        ConfigError: it is nested too deeply, or by a YAML alias without end, or has too many values once all
            its aliases are written out.
    """
    measured: dict[int, tuple[int, int]] = {}

    def measure(value: Any, depth: int) -> tuple[int, int]:
        """Return how many values it is, and how many levels."""
        if not isinstance(value, dict | list):
            return 1, 0
        size, height = measured.get(id(value), (1, 1))
        if id(value) not in measured and depth <= _MAX_DEPTH:
            for item in value.values() if isinstance(value, dict) else value:
                more, below = measure(item, depth + 1)
                size, height = size + more, max(height, below + 1)
            measured[id(value)] = size, height
        if depth + height > _MAX_DEPTH + 1:
            raise ConfigError(f"{label}: {_TOO_DEEP}")
        return size, height

    if measure(value, 0)[0] > _MAX_VALUES:
        raise ConfigError(f"{label}: wanted at most {_MAX_VALUES} values, with all aliases written out")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]], label: str) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ConfigError(f"{label}: key {twice!r} is given twice")
    return dict(pairs)


def _read_bytes(location: str) -> bytes:
    if "://" in location:
        from danling_core import storage

        return storage.read_bytes(location, _MAX_BYTES)
    path = Path(location).expanduser()
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{location}: wanted at most {_MAX_BYTES} bytes")
    return data
