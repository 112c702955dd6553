"""Attributes of a runner that training changes: found when training is set up, and saved by their names."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from danling_core.checkpoints.plain import to_plain
from danling_core.data.batches import to_cpu
from danling_core.data.generators import KINDS, generator_state, restore_generator
from danling_core.metrics import states as metric_states
from danling_core.parallel.modules import Modules, Slot
from danling_core.parallel.strategies import checksum, unwrap
from danling_core.runner.base import RunnerBase

_DEPTH = 3
_MOST_ITEMS = 64
_LARGEST_ARRAY_BYTES = 1 << 30
_SCALARS = (bool, int, float, str)
_OURS = {name for cls in RunnerBase.__mro__ for name in (*vars(cls), *getattr(cls, "__annotations__", ()))}


@dataclass(frozen=True)
class Found:
    """Something in an attribute: its name (`opt_d`, `nets.critic`), its value, and its place."""

    name: str
    value: Any
    slot: Slot


class Attributes:
    """The user's own attributes of a runner, by kind.

    Everything with `state_dict` and `load_state_dict` is saved, also in lists, tuples and mappings, and so are random
    generators. A tensor, array, deque, number or text is saved once it is no longer what it was when training was
    set up.

    Args:
        runner: whose attributes are looked at.
        ignored: names to leave out.
        taken: objects that are saved already, by another name.
    """

    def __init__(self, runner: Any, ignored: set[str], taken: list[Any]) -> None:
        self._runner = runner
        self._ignored = ignored
        self.modules: dict[str, Found] = {}
        self.optimizers: dict[str, Optimizer] = {}
        self.schedulers: dict[str, LRScheduler] = {}
        self.others: dict[str, Any] = {}
        """With a state that may differ between ranks, by name; random generators among them."""
        self._plain: dict[str, Any] = {}
        known = {id(item) for item in taken}
        tensors = {id(t) for item in taken if isinstance(item, nn.Module) for t in _tensors(item)}
        parts = {id(part) for item in taken if isinstance(item, nn.Module) for part in item.modules()}
        for found in _find(runner, ignored):
            is_shared = found.value is None or type(found.value) in _SCALARS  # one object for many attributes
            if is_shared or id(found.value) not in known | parts:
                known.add(id(found.value))
                self._sort(found, tensors, parts)

    def _sort(self, found: Found, tensors: set[int], parts: set[int]) -> None:
        name, value = found.name, found.value
        if isinstance(value, nn.Module) and not hasattr(value, "persistent"):  # no metric of torchmetrics
            own = {id(tensor) for tensor in _tensors(unwrap(value))}
            if own <= tensors:  # another view of modules that are saved
                return
            tensors |= own
            parts |= {id(part) for part in value.modules()}
            self.modules[name] = found
        elif isinstance(value, Optimizer):
            self.optimizers[name] = value
        elif isinstance(value, LRScheduler):
            self.schedulers[name] = value
        elif isinstance(value, KINDS) or _has_state(value):
            self.others[name] = value
        elif "." not in name:
            self._plain[name] = _mark(value)

    @property
    def names(self) -> list[str]:
        """Return the names of what every checkpoint holds."""
        return [*self.modules, *self.optimizers, *self.schedulers, *self.others]

    def check(self) -> None:
        """Raise CheckpointError, naming the attribute, where a state has something that cannot be saved."""
        for name, value in self.others.items():
            to_plain(_state_of(value), lambda tensor: tensor, (name,))

    def state_dict(self) -> dict[str, Any]:
        """Return the states of this rank."""
        changed = {
            name: _plain_value(getattr(self._runner, name, None))
            for name, mark in self._plain.items()
            if _mark(getattr(self._runner, name, None)) != mark
        }
        return {
            "states": {name: to_cpu(_state_of(value)) for name, value in self.others.items()},
            "values": {name: value for name, value in changed.items() if value is not None},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, of the attributes that are here."""
        for name, saved in state["states"].items():
            if name in self.others:
                _take_state(self.others[name], saved)
        for name, saved in state["values"].items():
            if name in self._plain:
                self._take_value(name, saved)

    def _take_value(self, name: str, saved: Any) -> None:
        """Put a value into the object that is there, since others may hold it too; else in its place."""
        there = getattr(self._runner, name, None)
        if type(saved) in _SCALARS:
            setattr(self._runner, name, saved)
        elif isinstance(there, collections.deque) and isinstance(saved, list):
            there.clear()
            there.extend(saved)
        elif isinstance(there, torch.Tensor) and there.shape == saved.shape and there.dtype == saved.dtype:
            with torch.no_grad():
                there.copy_(saved)
        elif isinstance(there, np.ndarray):
            array = np.asarray(saved).astype(there.dtype)
            if array.shape == there.shape:
                there[...] = array
            else:
                setattr(self._runner, name, array)
        else:
            setattr(self._runner, name, saved.to(there.device) if isinstance(there, torch.Tensor) else saved)


class ModuleState:
    """State of a module that is no part of the model; nothing, while an untrained one is as it was.

    A frozen teacher costs a checkpoint nothing.

    Args:
        name: in `modules`.
        modules: which hold it.
        is_trained: an optimizer steps it, so that it is saved in any case.
    """

    def __init__(self, name: str, modules: Modules, is_trained: bool) -> None:
        self._name = name
        self._modules = modules
        self._first = None if is_trained else self._sums()

    def state_dict(self) -> dict[str, Any] | None:
        if self._first is not None and self._first == self._sums():
            return None
        state: dict[str, Any] = self._modules.own[self._name].state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        if state is not None:
            self._modules.own[self._name].load_state_dict(state)

    def _sums(self) -> list[int]:
        return [int(checksum(tensor)) for tensor in _tensors(self._modules.own[self._name]) if tensor.numel()]


def _find(runner: Any, ignored: set[str]) -> Iterator[Found]:
    for name, value in list(vars(runner).items()):
        if name not in _OURS and name != "_parts" and name not in ignored:
            slot = Slot(lambda n=name: getattr(runner, n), lambda new, n=name: setattr(runner, n, new))  # type: ignore[misc]
            yield from _walk(name, value, slot, 0)


def _walk(name: str, value: Any, slot: Slot, depth: int) -> Iterator[Found]:
    yield Found(name, value, slot)
    if depth >= _DEPTH or isinstance(value, nn.Module) or not isinstance(value, list | tuple | dict):
        return
    if len(value) > _MOST_ITEMS:
        return
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        put = None if isinstance(value, tuple) else lambda new, v=value, k=key: v.__setitem__(k, new)
        yield from _walk(f"{name}.{key}", item, Slot(lambda v=value, k=key: v[k], put), depth + 1)  # type: ignore[misc]


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _has_state(value: Any) -> bool:
    """Return whether an object has a state to save. Asked of its class: some objects answer to any name."""
    kind = type(value)
    return all(callable(getattr(kind, name, None)) for name in ("state_dict", "load_state_dict"))


def _state_of(value: Any) -> Any:
    if isinstance(value, KINDS):
        return generator_state(value)
    return metric_states.saved(value) if hasattr(value, "persistent") else value.state_dict()


def _take_state(value: Any, saved: Any) -> None:
    if isinstance(value, KINDS):
        restore_generator(value, saved)
    elif hasattr(value, "persistent"):
        metric_states.restore(value, saved, value.device)
    else:
        value.load_state_dict(saved)


def _mark(value: Any) -> Any:
    """Return what tells whether a tensor, array, deque, number or text has changed; None for anything else."""
    if isinstance(value, nn.Parameter):
        return None
    if isinstance(value, torch.Tensor):
        return "tensor", id(value), value._version
    if isinstance(value, np.ndarray) and value.dtype != object:
        is_small = value.nbytes <= _LARGEST_ARRAY_BYTES
        return (
            "array",
            id(value),
            xxhash.xxh3_64_intdigest(_bytes_of(value)) if is_small else 0,
        )
    if type(value) in _SCALARS:
        return type(value), value
    if isinstance(value, collections.deque):
        return "deque", len(value), [(id(item), getattr(item, "_version", 0)) for item in value]
    return None


def _bytes_of(array: np.ndarray[Any, Any]) -> memoryview:
    """Return the bytes of an array of any shape and type; not copied where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _plain_value(value: Any) -> Any:
    """Return a copy to save, on the CPU; None where there is none."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value))
    if type(value) in _SCALARS:
        return value
    return to_cpu(list(value)) if isinstance(value, collections.deque) else None
