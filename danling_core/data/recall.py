"""Going back to a place in the data by the state of its source, instead of reading a pass up to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from danling_core.data.batches import to_cpu
from danling_core.data.facts import hash_of
from danling_core.data.generators import random_state, resumed_stream

State = Mapping[str, Any]


class Recall:
    """Way back to where a stream's source was before the last window of this rank, with a hash of that window.

    A state that does not hold all (a shuffle buffer, random numbers of loader workers) is found out by this: from
    there the window is another. So a resume goes back over one window, and can tell.

    Args:
        source: with `state_dict` and `load_state_dict`.
        draws_here: whether samples are drawn from this rank's global generators.
    """

    def __init__(self, source: Any, draws_here: bool) -> None:
        self._source = source
        self._draws_here = draws_here
        self._before: State = {}
        self._batches: list[Any] = []
        self._iters = 0

    def before(self) -> None:
        """Note where the source is: a window is to be drawn."""
        self._before = {"source": self._source.state_dict()}
        if self._draws_here:
            self._before["random"] = random_state()

    def after(self, batches: list[Any], iters: int) -> None:
        """Note the batches of this rank in the window of so many iters."""
        self._batches, self._iters = batches, iters

    def state_dict(self, *, is_inside: bool) -> dict[str, Any] | None:
        """Return what leads back to the end of the last window; None where this rank had no batch in it.

        Args:
            is_inside: a pass is under way.
        """
        if self._iters == 0:
            return None
        if not is_inside:
            return {"source": to_cpu(self._source.state_dict()), "iters": 0}
        if not self._batches:
            return None
        found = {"iters": self._iters, "batches": len(self._batches), "hash": hash_of(self._batches)}
        return {**to_cpu(self._before), **found}

    def redraw(self, state: State, iterator: Iterator[Any]) -> tuple[list[Any], bool]:
        """Draw the window of `state` from an iterator that begins there; return its batches, and whether they are the
        same."""
        if "random" in state:
            with resumed_stream(state["random"]):
                batches = list(islice(iterator, state["batches"]))
        else:
            batches = list(islice(iterator, state["batches"]))
        self._before = {name: state[name] for name in ("source", "random") if name in state}
        self.after(batches, state["iters"])
        return batches, hash_of(batches) == state["hash"]
