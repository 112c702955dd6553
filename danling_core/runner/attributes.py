"""Attributes of a runner that training changes: found when training is set up, and saved by their names."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from danling_core.checkpoints.plain import to_plain
from danling_core.data.batches import to_cpu
from danling_core.data.generators import KINDS, generator_state, restore_generator
from danling_core.metrics import states as metric_states
from danling_core.parallel.modules import Modules, Slot
from danling_core.parallel.strategies import digest, unwrap
from danling_core.runner.base import RunnerBase
from danling_core.runner.values import PLAIN, Unsaved, decode, encode, inner, mark

logger = logging.getLogger("danling")

_DEPTH = 3
_MOST_ITEMS = 4096
_OURS = {name for cls in RunnerBase.__mro__ for name in (*vars(cls), *getattr(cls, "__annotations__", ()))}


@dataclass(frozen=True)
class Found:
    """Something in an attribute: its name (`opt_d`, `nets.critic`), its value, and its place."""

    name: str
    value: Any
    slot: Slot


class Attributes:
    """The user's own attributes of a runner, by kind.

    Everything with `state_dict` and `load_state_dict` is saved, also in containers and in objects of the user's own
    classes, and so are random generators. Of the rest, what is no longer what it was when training was set up is saved
    by its value; where no checkpoint can hold that, the checkpoint says so.

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
        self.not_restored: dict[str, str] = {}
        """Attributes that a checkpoint holds and that could not be made again, and why."""
        self._first: dict[str, int] = {}
        self._told: set[str] = set()
        known = {id(item) for item in taken}
        tensors = {id(t) for item in taken if isinstance(item, nn.Module) for t in _tensors(item)}
        parts = {id(part) for item in taken if isinstance(item, nn.Module) for part in item.modules()}
        for found in _find(runner, ignored):
            if id(found.value) not in known and id(found.value) not in parts:
                known.add(id(found.value))
                self._sort(found, tensors, parts)
        for name, value in _values(runner, ignored):
            self._first[name] = mark(value, _is_kept)

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

    @property
    def names(self) -> list[str]:
        """Return the names of what every checkpoint holds."""
        return [*self.modules, *self.optimizers, *self.schedulers, *self.others]

    def check(self) -> None:
        """Raise CheckpointError, naming the attribute, where a state has something that cannot be saved."""
        for name, value in self.others.items():
            to_plain(_state_of(value), lambda tensor: tensor, (name,))

    def state_dict(self) -> dict[str, Any]:
        """Return the states of this rank, the values that have changed, and the names of those that cannot be saved."""
        values: dict[str, Any] = {}
        lost: dict[str, str] = {}
        for name, value in _values(self._runner, self._ignored):
            if mark(value, _is_kept) == self._first.get(name):
                continue
            try:
                if name not in self._first and _is_kept(value):
                    raise Unsaved(f"a {type(value).__qualname__} that was made after training had begun")
                values[name] = encode(value, _is_kept)
            except Unsaved as reason:
                lost[name] = str(reason)
        self._tell(lost)
        states = {name: to_cpu(_state_of(value)) for name, value in self.others.items()}
        return {"states": states, "values": values, "lost": sorted(lost)}

    def _tell(self, lost: Mapping[str, str]) -> None:
        for name in lost.keys() - self._told:
            self._told.add(name)
            logger.warning(
                "training changes self.%s, and no checkpoint can hold it (%s): a resume will not have the bits of this "
                "run. Give it state_dict and load_state_dict, or make it before training; training_state.ignore(%r) "
                "says that it does not matter",
                *(name, lost[name], name),
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, of the attributes that are here."""
        for name, saved in state["states"].items():
            if name in self.others:
                _take_state(self.others[name], saved)
        for name, saved in state["values"].items():
            if name in self._ignored:
                continue
            try:
                setattr(self._runner, name, decode(getattr(self._runner, name, None), saved))
            except Unsaved as reason:
                self.not_restored[name] = str(reason)


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
        return [digest(tensor) for tensor in _tensors(self._modules.own[self._name])]


def _is_kept(value: Any) -> bool:
    """Return whether an object is found and saved by itself, wherever it stands."""
    if type(value) in PLAIN:
        return False
    return isinstance(value, (nn.Module, nn.Parameter, Optimizer, LRScheduler, *KINDS)) or _has_state(value)


def _values(runner: Any, ignored: set[str]) -> Iterator[tuple[str, Any]]:
    """Yield the user's own attributes, those that training has made included."""
    for name, value in list(vars(runner).items()):
        if name not in _OURS and name != "_parts" and name not in ignored:
            yield name, value


def _find(runner: Any, ignored: set[str]) -> Iterator[Found]:
    """Yield the objects that are saved by themselves, wherever they stand in the user's attributes."""
    for name, value in list(vars(runner).items()):
        is_own = name not in _OURS or (name == "criterion" and isinstance(value, list | tuple | dict))
        if is_own and name != "_parts" and name not in ignored:
            slot = Slot(lambda n=name: getattr(runner, n), lambda new, n=name: setattr(runner, n, new))  # type: ignore[misc]
            yield from _walk(name, value, slot, 0)


def _walk(name: str, value: Any, slot: Slot, depth: int) -> Iterator[Found]:
    if _is_kept(value):
        yield Found(name, value, slot)
        return
    if depth >= _DEPTH:
        return
    if not isinstance(value, list | tuple | dict):
        for key, item in inner(value):
            place = Slot(lambda v=value, k=key: getattr(v, k), lambda new, v=value, k=key: setattr(v, k, new))  # type: ignore[misc]
            yield from _walk(f"{name}.{key}", item, place, depth + 1)
        return
    if PLAIN.issuperset(map(type, value.values() if isinstance(value, dict) else value)):
        return  # fast: such containers may be long
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in itertools.islice(items, _MOST_ITEMS):
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
