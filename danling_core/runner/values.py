"""Plain values in a runner's attributes: told apart by their content, put into a checkpoint, and put back."""

from __future__ import annotations

import collections
import dataclasses
import enum
import marshal
import sys
import sysconfig
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from danling_core.checkpoints.plain import to_plain
from danling_core.errors import CheckpointError
from danling_core.parallel.strategies import digest

_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_SEQUENCES = (list, tuple, collections.deque)
PLAIN = {bool, int, float, str, type(None)}
_TAG = "danling:"
_KINDS = ("kept", "enum", "mapping", "scalar", "array", "numbers", "deque", "object")
_MAPPINGS = (collections.OrderedDict, collections.defaultdict, collections.Counter)
_MAKEABLE = {f"collections:{kind.__name__}": kind for kind in (collections.OrderedDict, collections.Counter)}
_DEPTH = 20
_MOST_NODES = 2000
_FEW, _MOST_SAVED = 64, 20_000
_MOST_HASHED = 1_000_000
_MOST_BYTES = 64 << 20
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})

IsKept = Callable[[Any], bool]
"""Returns whether an object is saved by itself: what it holds is none of a value's content."""


class Unsaved(Exception):
    """Raised where a value has a part that no checkpoint can hold, or that cannot be made again; says which."""


def fingerprint(value: Any, is_kept: IsKept) -> int:
    """Return a hash of what a value holds: it changes when that does, and is the same in another process.

    Looked into are containers, and objects of the user's own classes. Of long ones, and of tensors and arrays of more
    than 64 MiB, a sample is taken. Functions, classes and objects of libraries count as unchanging.
    """
    hasher = xxhash.xxh3_64()
    for part in _parts(value, is_kept, set(), [_MOST_NODES]):
        hasher.update(part)
    return hasher.intdigest()


def mark(value: Any, is_kept: IsKept) -> int:
    """Return a hash as `fingerprint` does, for this process only: plain containers are hashed whole, and fast."""
    if type(value) in (list, tuple, dict) and len(value) <= _MOST_HASHED:
        try:
            return xxhash.xxh3_64_intdigest(
                marshal.dumps(value, 2)
            )  # without references, which depend on their count
        except ValueError:  # something else is in it
            pass
    return fingerprint(value, is_kept)


def encode(value: Any, is_kept: IsKept) -> Any:
    """Return the value in what a checkpoint can hold, with tensors on the CPU. Raises `Unsaved`."""
    return _encode(value, is_kept, ())


def decode(there: Any, saved: Any) -> Any:
    """Return the value that `encode` has put into `saved`; in the object that is there, where it fits: others may hold
    that one too. Raises `Unsaved` where the value needs an object that is not there."""
    if isinstance(saved, dict):
        return _decode_mapping(there, saved)
    if isinstance(saved, list):
        items = _decode_items(there, saved)
        return _refilled(there, items) if isinstance(there, list) else items
    if isinstance(saved, tuple):
        return tuple(_decode_items(there, list(saved)))
    if isinstance(saved, set):
        return _refilled(there, saved) if isinstance(there, set) else saved
    if isinstance(saved, torch.Tensor):
        return _decode_tensor(there, saved)
    return saved


def inner(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what an object of a user's own class, or a namespace, holds, by name; nothing of any other."""
    if _is_open(value):
        yield from list(vars(value).items())


def _parts(value: Any, is_kept: IsKept, seen: set[int], left: list[int]) -> Iterator[bytes]:
    left[0] -= 1
    kind = type(value)
    if kind in _SCALARS or isinstance(value, np.generic | enum.Enum):
        yield f"{kind.__qualname__}:{value!r};".encode()
    elif isinstance(value, torch.Tensor):
        yield _of_tensor(value)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        yield f"array:{value.dtype}:{value.shape};".encode()
        yield bytes(_of_array(value))
    elif is_kept(value) or id(value) in seen or left[0] <= 0:
        yield b"?"
    else:
        seen.add(id(value))
        yield f"{kind.__qualname__}:{_length(value)};".encode()
        for key, item in _items(value):
            yield f"{key!r}=".encode() if key is None or type(key) in _SCALARS else b"="
            yield from _parts(item, is_kept, seen, left)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the items of a container or an open object; of a long one every so many."""
    if isinstance(value, dict):
        found: Any = list(value.items())
    elif isinstance(value, set | frozenset):
        found = [(None, item) for item in sorted(value, key=repr)]
    elif isinstance(value, (*_SEQUENCES, np.ndarray)):
        found = value.reshape(-1) if isinstance(value, np.ndarray) else value
        if isinstance(found, collections.deque):
            found = list(found)
        step = 1 + len(found) // _MOST_NODES
        found = [(None, found[index]) for index in range(0, len(found), step)]
    else:
        found = list(inner(value))
    yield from found[:: 1 + len(found) // _MOST_NODES]


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (dict, set, frozenset, *_SEQUENCES)) else 0


def _of_tensor(tensor: torch.Tensor) -> bytes:
    head = f"tensor:{tensor.dtype}:{tuple(tensor.shape)}:{tensor.device};"
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return f"{head}{id(tensor)}:{0 if tensor.is_inference() else tensor._version};".encode()
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().contiguous().reshape(-1)
    step = 1 + flat.numel() * flat.element_size() // _MOST_BYTES
    version = tensor._version if step > 1 and not tensor.is_inference() else 0
    return f"{head}{version}:{digest(flat[::step])};".encode()


def _of_array(array: np.ndarray[Any, Any]) -> memoryview:
    flat = np.ascontiguousarray(array).reshape(-1)
    sample = np.ascontiguousarray(flat[:: 1 + flat.nbytes // _MOST_BYTES])
    return sample.view(np.uint8).data


def _encode(value: Any, is_kept: IsKept, path: tuple[Any, ...]) -> Any:
    if type(value) in PLAIN:
        return value
    if isinstance(value, enum.Enum) and _class_of(_path_of(value)) is type(value):
        return {f"{_TAG}enum": value.name, f"{_TAG}type": _path_of(value)}
    if isinstance(value, np.generic):
        return {f"{_TAG}scalar": torch.from_numpy(np.array(value)), f"{_TAG}type": value.dtype.str}
    if isinstance(value, np.ndarray) and value.dtype != object:
        return {f"{_TAG}array": _plain(value, path), f"{_TAG}type": value.dtype.str}
    if isinstance(value, torch.Tensor) or type(value) in (*_SCALARS, set, bytearray):
        return _plain(value, path)
    if is_kept(value):
        return {f"{_TAG}kept": True}
    if type(value) is list and len(value) > _FEW and (kinds := set(map(type, value))) in ({int}, {float}):
        return _encode_numbers(value, kinds == {float})
    if isinstance(value, (dict, *_SEQUENCES)) and len(value) > _MOST_SAVED:
        raise Unsaved(
            f"{len(value)} items are too many for each checkpoint: keep them in a tensor or an array"
        )
    if type(value) in (list, tuple) and PLAIN.issuperset(map(type, value)):
        return type(value)(value)
    if type(value) in (list, tuple):
        return type(value)(_encode(item, is_kept, (*path, index)) for index, item in enumerate(value))
    if type(value) is collections.deque:
        items = [_encode(item, is_kept, (*path, index)) for index, item in enumerate(value)]
        return {f"{_TAG}deque": items, f"{_TAG}maxlen": value.maxlen}
    if type(value) in (dict, *_MAPPINGS):
        found = {_plain(key, path): _encode(item, is_kept, (*path, key)) for key, item in value.items()}
        return found if type(value) is dict else {f"{_TAG}mapping": found, f"{_TAG}type": _path_of(value)}
    if _is_open(value) and len(path) < _DEPTH:
        found = {name: _encode(item, is_kept, (*path, name)) for name, item in inner(value)}
        return {f"{_TAG}object": found, f"{_TAG}type": _path_of(value)}
    raise Unsaved(f"{'.'.join(map(str, path)) + ' is ' if path else ''}a {type(value).__qualname__}")


def _encode_numbers(value: list[Any], are_floats: bool) -> dict[str, Any]:
    try:
        return {
            f"{_TAG}numbers": torch.from_numpy(np.array(value, dtype=np.float64 if are_floats else np.int64))
        }
    except OverflowError as error:
        raise Unsaved("it holds integers of more than 64 bits") from error


def _plain(value: Any, path: tuple[Any, ...]) -> Any:
    try:
        return to_plain(value, lambda tensor: tensor.cpu().clone(), path)
    except CheckpointError as error:
        raise Unsaved(str(error)) from error


def _decode_mapping(there: Any, saved: dict[Any, Any]) -> Any:
    if not any(isinstance(key, str) and key.startswith(_TAG) for key in saved):
        items = {key: decode(_get(there, key), item) for key, item in saved.items()}
        return _refilled(there, items) if isinstance(there, dict) else items
    kind = next(each for each in _KINDS if f"{_TAG}{each}" in saved)
    content, its_type = saved[f"{_TAG}{kind}"], saved.get(f"{_TAG}type")
    if kind == "kept":
        if there is None:
            raise Unsaved("a part with a state of its own that was made while training")
        return there
    if kind == "enum":
        found = _class_of(its_type)
        if not (isinstance(found, type) and issubclass(found, enum.Enum) and content in found.__members__):
            raise Unsaved(f"a value of {its_type}, which is not there")
        return found[content]
    if kind == "mapping":
        if there is None and its_type in _MAKEABLE:
            there = _MAKEABLE[its_type]()
        if there is None or _path_of(there) != its_type:
            raise Unsaved(f"a {its_type} that was made while training")
        return _refilled(there, {key: decode(_get(there, key), item) for key, item in content.items()})
    if kind == "scalar":
        return content.numpy().astype(saved[f"{_TAG}type"])[()]
    if kind == "array":
        return _decode_array(there, content.numpy().astype(saved[f"{_TAG}type"]))
    if kind == "numbers":
        return _refilled(there if isinstance(there, list) else [], content.tolist())
    if kind == "deque":
        is_fitting = isinstance(there, collections.deque) and there.maxlen == saved[f"{_TAG}maxlen"]
        known = there if is_fitting else collections.deque(maxlen=saved[f"{_TAG}maxlen"])
        return _refilled(known, _decode_items(there, content))
    if there is None or _path_of(there) != its_type:
        raise Unsaved(f"a {its_type} that was made while training")
    for name, item in content.items():
        setattr(there, name, decode(getattr(there, name, None), item))
    return there


def _decode_items(there: Any, saved: list[Any]) -> list[Any]:
    known = list(there) if isinstance(there, _SEQUENCES) else []
    return [decode(known[index] if index < len(known) else None, item) for index, item in enumerate(saved)]


def _decode_tensor(there: Any, saved: torch.Tensor) -> torch.Tensor:
    if not isinstance(there, torch.Tensor):
        return saved
    if there.shape == saved.shape and there.dtype == saved.dtype:
        with torch.no_grad():
            there.copy_(saved)
        return there
    return saved.to(there.device)


def _decode_array(there: Any, saved: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if isinstance(there, np.ndarray) and there.shape == saved.shape and there.dtype == saved.dtype:
        there[...] = saved
        return there
    return saved


def _refilled(there: Any, items: Any) -> Any:
    there.clear()
    (there.update if isinstance(there, dict | set) else there.extend)(items)
    return there


def _path_of(value: Any) -> str:
    return f"{type(value).__module__}:{type(value).__qualname__}"


def _class_of(path: Any) -> Any:
    """Return the class at `module:qualname` of a module that is loaded; None where there is none."""
    module, _, names = str(path).partition(":")
    found: Any = sys.modules.get(module)
    for name in names.split("."):
        found = getattr(found, name, None)
    return found


def _get(there: Any, key: Any) -> Any:
    return there.get(key) if isinstance(there, dict) else None


def _is_open(value: Any) -> bool:
    """Return whether an object may be looked into: a namespace, or one of a class of the user's own."""
    kind = type(value)
    if kind is SimpleNamespace:
        return True
    if isinstance(value, type | nn.Module) or callable(value) or not hasattr(value, "__dict__"):
        return False
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    is_own = file is None or not file.startswith(_LIBRARIES)
    return (dataclasses.is_dataclass(value) or is_own) and kind.__module__.partition(".")[0] not in (
        "builtins",
        "danling_core",
    )
