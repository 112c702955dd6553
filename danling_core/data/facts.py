"""Facts about a split's data, to tell at a resume whether it is still the same: type, length, a few samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from types import FunctionType
from typing import Any

import numpy as np
import torch
import xxhash
from torch.utils.data import IterableDataset

from danling_core.data.fetch import as_tensor_batches
from danling_core.data.generators import (
    find_generators,
    generator_state,
    restore_generator,
    seed_generator,
)
from danling_core.data.seeded import RandomStream, derive_seed

_SAMPLES = 3
_DEPTH = 20
_SEED = derive_seed("facts")


def facts_of(dataset: Any, with_samples: bool = True) -> dict[str, Any]:
    """Return type, length and a hash of the first, middle and last sample of a data set; None for what is not known.

    Samples are read with random generators of their own, which are put back after.

    Args:
        dataset: of any kind.
        with_samples: whether samples may be read in this process.
    """
    found: dict[str, Any] = {"type": type(dataset).__qualname__, "length": None, "content": None}
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return found
    tensors = as_tensor_batches(dataset)
    data = dataset if tensors is None else tensors
    try:
        length = len(data)
    except TypeError:
        return found
    if not with_samples:
        return {**found, "length": length}
    generators = list(find_generators(dataset).values())
    before = [generator_state(generator) for generator in generators]
    try:
        with RandomStream(_SEED):
            for generator in generators:
                seed_generator(generator, _SEED)
            indices = (
                sorted({index * (length - 1) // (_SAMPLES - 1) for index in range(_SAMPLES)})
                if length
                else []
            )
            samples = hash_of([data[index] for index in indices])
    except Exception:  # a sample that cannot be read says so when it is trained on
        return {**found, "length": length}
    finally:
        for generator, state in zip(generators, before, strict=True):
            restore_generator(generator, state)
    return {**found, "length": length, "content": samples}


def what_differs(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what changed of each split, a line each; facts that one of the two does not know are passed over."""
    found = []
    for split in before:
        if split not in now:
            found.append(f"split {split!r} is gone")
            continue
        for name, was in {**dict.fromkeys(now[split]), **before[split]}.items():
            value = now[split].get(name)
            if name == "varies":
                if was or value:
                    found.append(f"split {split!r} gives other samples each time it is read")
                continue
            if was is not None and value is not None and was != value:
                told = {"content": "samples are not the same", "seeds": "seeds of its generators are others"}
                changed = told.get(name, f"{name} was {was} and is {value}")
                found.append(f"split {split!r}: the {changed}")
                break
    return found


def hash_of(value: Any) -> str:
    """Return a hash of samples or batches: of tensors, arrays, texts, numbers, images, and containers of these.

    Raises:
        TypeError: it holds something else, whose content is not known.
    """
    digest = xxhash.xxh3_64()
    _add(digest, value, ())
    return digest.hexdigest()


def _add(digest: Any, value: Any, around: tuple[int, ...]) -> None:
    kind = type(value)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if value.layout is not torch.strided or value.is_nested:
            raise TypeError("a tensor of another layout")
        digest.update(repr((value.dtype, tuple(value.shape))).encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy() if value.numel() else b"")
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(repr((value.dtype, value.shape)).encode() + np.ascontiguousarray(value).tobytes())
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes | Enum):
        digest.update(f"{kind.__qualname__} {value!r} ".encode())
    elif (
        isinstance(value, np.generic) or callable(getattr(value, "tobytes", None)) and kind is not np.ndarray
    ):
        digest.update(kind.__qualname__.encode() + value.tobytes())  # an image among them
    elif id(value) in around or len(around) > _DEPTH or isinstance(value, type | FunctionType):
        raise TypeError(f"a {kind.__qualname__}")
    else:
        digest.update(kind.__qualname__.encode())
        for item in _inside(value):
            _add(digest, item, (*around, id(value)))


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from (key, item)
    elif isinstance(value, np.ndarray):
        yield from value.ravel().tolist()
    elif isinstance(value, list | tuple):
        yield from value
    elif isinstance(value, set | frozenset):
        yield sorted(map(repr, value))
    elif hasattr(value, "__dict__"):  # a data class, or one of the user's own
        yield vars(value)
    else:
        raise TypeError(f"a {type(value).__qualname__}")
