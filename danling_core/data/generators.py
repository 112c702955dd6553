"""Random generators that a user holds: of torch, NumPy and Python; found in objects, saved, restored, seeded."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from danling_core.data.seeded import RandomStream, capture, derive_seed

_DEPTH = 4
_MOST_ITEMS = 64
_MOST_OBJECTS = 2000
Kinds = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def find_generators(value: Any, path: str = "") -> dict[str, Kinds]:
    """Return the generators in an object's attributes, lists and mappings, by their path; each once.

    Goes into wrapped data sets and transforms, four levels deep, and not into data: long lists, tensors, arrays.
    """
    found: dict[str, Kinds] = {}
    seen: set[int] = set()

    def look(item: Any, at: str, depth: int) -> None:
        if id(item) in seen or depth > _DEPTH:
            return
        seen.add(id(item))
        if isinstance(item, KINDS):
            found[at] = item
            return
        for name, inner in _inside(item):
            look(inner, f"{at}.{name}" if at else name, depth + 1)

    look(value, path, 0)
    return found


def _inside(item: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(item, (str, bytes, int, float, torch.Tensor, np.ndarray, type)) or item is None:
        return
    if isinstance(item, Mapping):
        if len(item) <= _MOST_ITEMS:
            yield from ((str(key), inner) for key, inner in item.items())
    elif isinstance(item, (list, tuple)):
        if len(item) <= _MOST_ITEMS:
            yield from ((str(index), inner) for index, inner in enumerate(item))
    elif hasattr(item, "__dict__"):
        yield from list(vars(item).items())


def held_by(item: Any) -> list[Kinds]:
    """Return the generators in an object's own attributes, and no deeper; each once."""
    held = list(vars(item).values()) if hasattr(item, "__dict__") else []
    return list({id(each): each for each in held if isinstance(each, KINDS)}.values())


def unseeded_in(value: Any) -> str | None:
    """Return the path to a generator in an object that nobody seeded, as `shuffle()` of Hugging Face makes one without
    `seed`; None where there is none.

    NumPy's generators tell: one that was given no seed began with 128 bits of the system's.
    """
    waiting: list[tuple[str, Any]] = [(type(value).__name__, value)]
    seen: set[int] = set()
    while waiting and len(seen) < _MOST_OBJECTS:
        path, item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, np.random.Generator):
            entropy = getattr(item.bit_generator.seed_seq, "entropy", None)
            if isinstance(entropy, int) and entropy >> 64:
                return path
        elif not isinstance(item, torch.nn.Module):
            waiting += [(f"{path}.{name}", each) for name, each in _inside(item)]
    return None


class Beginning:
    """A generator with the state in which the user gave it: each pass begins anew from a state of its own.

    Args:
        generator: has drawn nothing yet.
    """

    def __init__(self, generator: Kinds) -> None:
        self._generator = generator
        self._state = generator_state(generator)
        if isinstance(generator, torch.Generator):
            self._seed = generator.initial_seed()
        else:
            self._seed = first_seed(generator)

    def begin_pass(self, number: int) -> None:
        """Go to the user's state for the first pass, and to one derived from it for each later one."""
        if number:
            seed_generator(self._generator, derive_seed("given", self._seed, number))
        elif isinstance(self._generator, torch.Generator):
            self._generator.manual_seed(self._seed)
        else:
            restore_generator(self._generator, self._state)


def generator_state(generator: Kinds) -> Any:
    """Return the state of a generator, in tensors and plain values."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    state = bits.state if isinstance(bits, np.random.BitGenerator) else bits.get_state(legacy=False)
    return _plain(state)


def restore_generator(generator: Kinds, state: Any) -> None:
    """Put back what `generator_state` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        version, internal, gauss = state
        generator.setstate((version, tuple(internal), gauss))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = _arrays(state)
    else:
        generator.set_state(_arrays(state))


def seed_generator(generator: Kinds, seed: int) -> None:
    """Begin a generator anew from a seed."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif isinstance(generator, np.random.RandomState):
        generator.seed(seed & 0xFFFFFFFF)
    else:
        generator.bit_generator.state = type(generator.bit_generator)(seed).state


def first_seed(generator: Kinds) -> int:
    """Return a number that tells the seed a user gave, from the state that it led to."""
    state = generator_state(generator)
    return derive_seed(repr(state.tolist() if isinstance(state, torch.Tensor) else state))


def random_state(stream: RandomStream | None = None) -> dict[str, Any] | None:
    """Return the state of a random stream, None for one that was not entered; by default of the global generators."""
    state = capture() if stream is None else stream.inner
    if state is None:
        return None
    python, cpu, bits = state
    numpy = None if bits is None else generator_state(np.random.RandomState(bits))
    return {"python": python, "torch": cpu, "numpy": numpy}


def resumed_stream(state: Mapping[str, Any]) -> RandomStream:
    """Return a random stream that goes on where `random_state` was taken."""
    (version, internal, gauss), bits = state["python"], None
    if state["numpy"] is not None:
        bits = np.random.MT19937()
        restore_generator(np.random.RandomState(bits), state["numpy"])
    stream = RandomStream(0)
    stream.inner = (version, tuple(internal), gauss), state["torch"], bits
    return stream


def _plain(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {key: _plain(item) for key, item in state.items()}
    if isinstance(state, np.ndarray):
        return {"dtype": str(state.dtype), "bytes": state.tobytes()}
    return state.item() if isinstance(state, np.generic) else state


def _arrays(state: Any) -> Any:
    if isinstance(state, Mapping) and set(state) == {"dtype", "bytes"}:
        return np.frombuffer(state["bytes"], dtype=state["dtype"]).copy()
    return {key: _arrays(item) for key, item in state.items()} if isinstance(state, Mapping) else state
