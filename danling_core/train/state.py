"""Contents of a checkpoint: named parts of a training, saved together and restored in a stated order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from danling_core.data.batches import to_cpu
from danling_core.errors import CheckpointError

VERSION = 1


class Order(IntEnum):
    """When a part is restored. The generators come last: making an iterator draws from them."""

    weights = 0
    optimizers = 1
    counters = 2
    positions = 3
    generators = 4


class Stateful(Protocol):
    """Anything with these two; tensors and plain values only, since no code is loaded from a checkpoint."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


@dataclass(frozen=True)
class Part:
    """One named part.

    Args:
        save: returns its state, or None where there is none now.
        load: takes over what `save` returned; None where the checkpoint lacks the part.
        order: when it is loaded.
        merge: of a part of each rank's own: takes over the states of all former ranks, where the world size has
            changed; None: nothing is taken over then.
    """

    save: Callable[[], Any]
    load: Callable[[Any], None]
    order: Order
    merge: Callable[[list[Any]], None] | None = None


class TrainingState:
    """The parts of a training by name. Parts are *shared* (equal on all ranks) or of each *rank*."""

    def __init__(self) -> None:
        self.shared: dict[str, Part] = {}
        self.per_rank: dict[str, Part] = {}
        self.ignored: set[str] = set()
        """Attributes of the runner that are not saved, though they have a state."""
        self.objects: list[Any] = []
        """What was registered."""
        self.is_fixed = False
        """Whether training is set up: a resume, which comes then, would miss a part that is registered later."""

    def register(
        self,
        name: str,
        part: Stateful,
        *,
        shared: bool = False,
        merge: Callable[[list[Any]], None] | None = None,
        order: Order = Order.weights,
    ) -> None:
        """Have `part` saved with every checkpoint under `name`, and restored by every resume.

        Args:
            name: its name in the checkpoint.
            part: the object. Each rank's own state is saved, and given back to the same rank.
            shared: the states are equal on all ranks, as of a second model under DDP: rank 0's is saved for all.
            merge: where the world size has changed, called on each rank with the states of all former ranks, in
                rank order; by default, every rank takes over rank 0's.
            order: when it is restored. By default with the weights, and so before an evaluation of the best ones.

        Raises:
            CheckpointError: the name is taken, or training has begun.
        """
        if self.is_fixed:
            raise CheckpointError(
                f"{name!r} is registered after training began, where no resume would restore it: register it in "
                "the runner's __init__"
            )
        if name in self.shared or name in self.per_rank:
            raise CheckpointError(f"a part of the state is called {name!r} already: choose another name")

        self.objects.append(part)

        def load(state: Any) -> None:
            if state is not None:
                part.load_state_dict(state)

        def save() -> Any:
            return to_cpu(part.state_dict())

        def load_first(states: list[Any]) -> None:
            load(states[0] if states else None)

        if shared:
            self.add(name, part.state_dict, load, order)
        else:
            self.add_per_rank(name, save, load, order, merge or load_first)

    def ignore(self, *names: str) -> None:
        """Leave these attributes of the runner out of every checkpoint, though they have a `state_dict`.

        Call it in the runner's `__init__`, for what a resume makes anew: `self.training_state.ignore("teacher")`.
        """
        self.ignored.update(names)

    def add(
        self,
        name: str,
        save: Callable[[], Any],
        load: Callable[[Any], None] = lambda state: None,
        order: Order = Order.counters,
    ) -> None:
        """Add a shared part by two functions; see `Part`."""
        self._add(self.shared, name, Part(save, load, order))

    def add_per_rank(
        self,
        name: str,
        save: Callable[[], Any],
        load: Callable[[Any], None],
        order: Order,
        merge: Callable[[list[Any]], None] | None = None,
    ) -> None:
        """Add a part that differs between ranks; see `Part`."""
        self._add(self.per_rank, name, Part(save, load, order, merge))

    def adopt(self, before: TrainingState) -> None:
        """Take over the parts that only `before` has: those that a user registered."""
        self.shared = {**before.shared, **self.shared}
        self.per_rank = {**before.per_rank, **self.per_rank}
        self.ignored, self.objects = before.ignored, before.objects

    def shared_state(self) -> dict[str, Any]:
        """Return the state that is equal on all ranks; its tensors are the live ones."""
        return {"version": VERSION, **{name: part.save() for name, part in self.shared.items()}}

    def rank_state(self) -> dict[str, Any]:
        """Return this rank's own state."""
        states = {name: part.save() for name, part in self.per_rank.items()}
        return {name: state for name, state in states.items() if state is not None}

    def load_shared(self, state: Mapping[str, Any], up_to: Order = Order.generators) -> None:
        """Take over what `shared_state` returned, in order.

        Raises:
            CheckpointError: a newer version of danling wrote it.
        """
        found = state.get("version", VERSION)
        if found > VERSION:
            raise CheckpointError(
                f"the checkpoint has version {found}, this danling reads up to {VERSION}: update danling"
            )
        for name, part in _in_order(self.shared):
            if part.order <= up_to:
                part.load(state.get(name))

    def load_rank(
        self,
        states: Sequence[Mapping[str, Any]],
        rank: int,
        world_size: int,
        up_to: Order = Order.generators,
    ) -> None:
        """Take over this rank's own of the states of all former ranks, in order; after `load_shared`."""
        for name, part in _in_order(self.per_rank):
            if part.order > up_to:
                continue
            if len(states) == world_size:
                part.load(states[rank].get(name))
            elif part.merge is not None:
                part.merge([state[name] for state in states if state.get(name) is not None])

    def _add(self, parts: dict[str, Part], name: str, part: Part) -> None:
        if name in parts or name in ("version", "ranks"):
            raise CheckpointError(f"a part of the state is called {name!r} already: choose another name")
        parts[name] = part


def _in_order(parts: Mapping[str, Part]) -> list[tuple[str, Part]]:
    return sorted(parts.items(), key=lambda item: item[1].order)
