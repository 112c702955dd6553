"""Going back to a place in the data by the state of its source, instead of reading a pass up to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Literal

from danling_core.data.batches import to_cpu
from danling_core.data.facts import hash_of
from danling_core.data.generators import random_state, resumed_stream

State = Mapping[str, Any]
Ended = Literal["exhausted", "left"]


class Recall:
    """Way back to where a stream's source was before the last window of this rank, with a hash of that window.

    A state that does not hold all (a shuffle buffer, random numbers of loader workers) is found out by this: from
    there the window is another. So a resume goes back over one window, and can tell. The first window of a pass is not
    noted, since a pass begins with more than a state: it is read again after the last window of the pass before.

    Args:
        source: with `state_dict` and `load_state_dict`.
        draws_here: whether samples are drawn from this rank's global generators.
        hashes_late: take the hash when it is asked for; else at once, since a step may change its batch in place.
    """

    def __init__(self, source: Any, *, draws_here: bool, hashes_late: bool) -> None:
        self._source = source
        self._draws_here = draws_here
        self._hashes_late = hashes_late
        self._before: State = {}
        self._batches: list[Any] = []
        self._noted: dict[str, Any] | None = None
        self._hash: str | None = None

    def before(self) -> None:
        """Note where the source is, inside a pass: a window is to be drawn."""
        self._before = {"source": self._source.state_dict()}
        if self._draws_here:
            self._before["random"] = random_state()

    def after(self, batches: list[Any], number: int, position: int, iters: int) -> None:
        """Note this rank's batches of the window of so many iters, after which pass `number` is at `position`."""
        self._noted = {
            **self._before,
            "pass": number,
            "position": position,
            "iters": iters,
            "batches": len(batches),
            "ended": None,
        }
        self._batches, self._hash = batches, None
        if not self._hashes_late:
            self._hash, self._batches = _hash(batches), []

    def ended(self, how: Ended) -> None:
        """Note that the pass of the last window is over: its data was exhausted, or is left."""
        if self._noted is not None and self._noted["ended"] is None:
            self._noted["ended"] = how

    def state_dict(self) -> dict[str, Any] | None:
        """Return what leads back to the end of the last noted window; None before there is one, or where it has
        something whose content nobody can compare."""
        if self._noted is None:
            return None
        if self._hash is None and self._batches:
            self._hash = _hash(self._batches)
        return None if self._hash is None else {**to_cpu(self._noted), "hash": self._hash}

    def redraw(self, state: State, iterator: Iterator[Any]) -> tuple[list[Any], bool]:
        """Draw the window of `state` from an iterator that begins there; return its batches, and whether they are the
        same."""
        random = resumed_stream(state["random"]) if "random" in state else contextlib.nullcontext()
        with random:
            batches = list(islice(iterator, state["batches"]))
        self._noted = {name: value for name, value in state.items() if name != "hash"}
        self._hash, self._batches = state["hash"], []
        return batches, _hash(batches) == state["hash"]


def _hash(batches: list[Any]) -> str | None:
    with contextlib.suppress(TypeError):
        return hash_of(batches)
    return None
