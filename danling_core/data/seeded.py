"""Seeds by hashing, and random streams that leave the global generators as they were."""

from __future__ import annotations

import hashlib
import random
import sys
from types import TracebackType
from typing import Any

import torch

_State = tuple[Any, torch.Tensor, Any]


def derive_seed(*key: int | str) -> int:
    """Return 63 well-mixed bits from a key such as `("order", seed, pass)`: the same on every machine, forever."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's (where it is loaded) and torch's CPU generator of this process; CUDA is left
    alone."""
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed & 0xFFFFFFFF)


class RandomStream:
    """A random stream of its own for code that draws from the global generators.

    Inside `with stream:` the global generators continue this stream; outside they are what they were before.
    About 20 us for each entry, nearly all of it Python's generator: enter for a batch, not for each sample.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.inner: _State | None = None
        """Where the stream stands, outside of it; None before it was entered."""
        self._outer: _State | None = None

    def __enter__(self) -> RandomStream:
        self._outer = capture()
        if self.inner is None:
            _restore(_fresh(self._outer))
            seed_generators(self._seed)
        else:
            _restore(self.inner)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inner = capture()
        assert self._outer is not None
        _restore(self._outer)
        self._outer = None


# NumPy's generators are exchanged, which is a hundred times faster than to copy their states.


def capture() -> _State:
    """Return the state of the global generators; NumPy's generator itself, which goes on."""
    numpy = sys.modules.get("numpy")
    bits = numpy.random.get_bit_generator() if numpy is not None else None
    return random.getstate(), torch.default_generator.get_state(), bits


def _fresh(state: _State) -> _State:
    python, cpu, bits = state
    return python, cpu, None if bits is None else sys.modules["numpy"].random.MT19937()


def _restore(state: _State) -> None:
    python, cpu, bits = state
    random.setstate(python)
    torch.default_generator.set_state(cpu)
    if bits is not None:
        sys.modules["numpy"].random.set_bit_generator(bits)
