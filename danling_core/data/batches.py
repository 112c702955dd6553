"""A batch of any shape: how many samples it holds, and how it moves to a device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch

from danling_core.errors import ConfigError


def batch_size_of(batch: Any) -> int:
    """Return samples in a batch: the first dimension that all tensors in it have in common, however deep they are.

    Raises:
        ConfigError: there is no tensor with a dimension in it, or they differ.
    """
    if isinstance(batch, torch.Tensor) and batch.ndim > 0:
        return batch.shape[0]
    sizes = set(_first_dimensions(batch))
    if len(sizes) != 1:
        found = f"its tensors have first dimensions {sorted(sizes)}" if sizes else "there is no tensor in it"
        raise ConfigError(
            f"how many samples has a batch of type {type(batch).__name__}? {found[0].upper()}{found[1:]}: set "
            "self.size_of in the runner to a function that says so, as `self.size_of = lambda batch: len(batch[0])`"
        )
    return sizes.pop()


def count_labels(batch: Mapping[str, Any], ignore_index: int = -100, shift: bool = False) -> int:
    """Return the labels of a batch that count: tokens, where a loss is a mean over these.

    For `self.size_of = count_labels`: losses are then weighted by them. Read before the batch goes to its device.

    Args:
        batch: with `labels`, of any shape.
        ignore_index: label that does not count, as in torch's and transformers' losses.
        shift: leave out the first label of each row, as a causal language model of transformers does, which predicts
            the next token: `self.size_of = functools.partial(count_labels, shift=True)`.
    """
    labels = batch["labels"][..., 1:] if shift else batch["labels"]
    return int((labels != ignore_index).sum())


def to_device(batch: Any, device: torch.device, non_blocking: bool = False) -> Any:
    """Return the batch with every tensor in it on `device`. On a CPU device the batch itself, not looked into.

    Goes into mappings, lists, tuples, named tuples and dataclasses; anything else with a method `.to` is
    moved by it; the rest (strings, numbers) stays as it is.
    """
    if device.type == "cpu":
        return batch
    return _move(batch, device, non_blocking)


def to_cpu(value: Any) -> Any:
    """Return the value with every tensor in it on the CPU; see `to_device` for what is looked into."""
    return _move(value, torch.device("cpu"), False)


def _move(value: Any, device: torch.device, non_blocking: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=non_blocking)
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, Mapping):
        moved = {key: _move(item, device, non_blocking) for key, item in value.items()}
        return _like(value, moved)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_move(item, device, non_blocking) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_move(item, device, non_blocking) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fresh = copy.copy(value)
        for field in dataclasses.fields(value):
            # past __setattr__: the dataclass may be frozen
            object.__setattr__(fresh, field.name, _move(getattr(value, field.name), device, non_blocking))
        return fresh
    return value


def _like(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(mapping) is dict or not isinstance(mapping, MutableMapping):
        return items
    fresh = copy.copy(mapping)
    fresh.update(items)
    return fresh


def _first_dimensions(value: Any) -> Iterator[int]:
    if isinstance(value, torch.Tensor):
        if value.ndim > 0:
            yield value.shape[0]
        return
    for item in _items(value):
        yield from _first_dimensions(item)


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return ()
