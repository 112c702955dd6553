"""Plain states: what a checkpoint may hold, or a refusal with the path of the culprit."""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch

from danling_core.errors import CheckpointError

_MAX_DEPTH = 100
_SCALARS = (bool, int, float, complex, str, bytes)
_AS_THEY_ARE = (type(None), *_SCALARS, torch.dtype, torch.device, torch.Size)
_TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
Path = tuple[Any, ...]


def to_plain(state: Any, on_tensor: Callable[[torch.Tensor], Any], path: Path = ()) -> Any:
    """Return a copy of `state` in containers of its own, every tensor replaced by what `on_tensor` returns for it.

    NumPy arrays become tensors and NumPy scalars Python ones; subclasses of dict, list, int, float and str
    become the plain type, except OrderedDict (with the `_metadata` of a module's state) and Counter. Tensors
    reach `on_tensor` detached.

    Raises:
        CheckpointError: something that `torch.load(weights_only=True)` would refuse, with its path in the
            state.
    """
    kind = type(state)
    if kind in _AS_THEY_ARE:
        return state
    if isinstance(state, torch.Tensor):
        return on_tensor(_checked_tensor(state, path))
    if len(path) > _MAX_DEPTH:
        raise CheckpointError(
            f"{_show(path[:5])}... is nested deeper than {_MAX_DEPTH}: does it contain itself?"
        )
    if isinstance(state, dict):
        return _plain_dict(state, on_tensor, path)
    if kind in (list, tuple):
        return kind(to_plain(item, on_tensor, (*path, index)) for index, item in enumerate(state))
    if kind is set:
        return {_plain_key(item, path) for item in state}
    if kind is bytearray:
        return bytearray(state)
    return _converted(state, on_tensor, path)


def _plain_dict(
    state: dict[Any, Any], on_tensor: Callable[[torch.Tensor], Any], path: Path
) -> dict[Any, Any]:
    items = {_plain_key(key, path): to_plain(value, on_tensor, (*path, key)) for key, value in state.items()}
    if len(items) != len(state):
        raise _refusal(state, path, "two of its keys become the same plain key")
    if isinstance(state, Counter):
        return Counter(items)
    if not isinstance(state, OrderedDict):
        return items
    ordered = OrderedDict(items)
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        vars(ordered)["_metadata"] = to_plain(metadata, on_tensor, (*path, "_metadata"))
    return ordered


def _converted(state: Any, on_tensor: Callable[[torch.Tensor], Any], path: Path) -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(state, numpy.generic):
        item = state.item()
        if type(item) in _SCALARS:
            return item
    elif numpy is not None and isinstance(state, numpy.ndarray):
        try:
            native = numpy.array(state, dtype=state.dtype.newbyteorder("="), order="C")
            return on_tensor(torch.from_numpy(native))
        except TypeError as error:
            raise _refusal(state, path, f"an array of {state.dtype} has no tensor type") from error
    elif isinstance(state, list):
        return [to_plain(item, on_tensor, (*path, index)) for index, item in enumerate(state)]
    elif not isinstance(state, Enum):
        for kind in (int, float, str):
            if isinstance(state, kind):
                return kind(state)
    raise _refusal(state, path)


def _plain_key(key: Any, path: Path) -> Any:
    if key is None or type(key) in _SCALARS:
        return key
    if type(key) is tuple:
        return tuple(_plain_key(item, path) for item in key)
    plain = _converted(key, lambda tensor: tensor, path)
    if type(plain) not in _SCALARS:
        raise _refusal(key, path, "as a key")
    return plain


def _checked_tensor(tensor: torch.Tensor, path: Path) -> torch.Tensor:
    if type(tensor) not in _TENSOR_TYPES:
        raise _refusal(tensor, path, "give its plain tensor, for example `full_tensor()` of a DTensor")
    if tensor.is_meta:
        raise _refusal(tensor, path, "on the meta device it has no values")
    if tensor.requires_grad or type(tensor) is not torch.Tensor:
        tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor


def _refusal(value: Any, path: Path, why: str = "") -> CheckpointError:
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return CheckpointError(
        f"{_show(path)} is a {name}{f' ({why})' if why else ''}: a checkpoint holds tensors, numbers, text, "
        "bytes, None, and dicts, lists, tuples and sets of them; convert it before saving"
    )


def _show(path: Path) -> str:
    return "state" + "".join(f"[{key!r}]" for key in path)
