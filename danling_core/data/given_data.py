"""Data, samplers and loaders that the user gave for the splits: what is known of them, and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset

from danling_core.data.facts import facts_of
from danling_core.data.generators import Kinds, find_generators, first_seed, unseeded_in
from danling_core.data.seeded import derive_seed


class GivenSplit(NamedTuple):
    """Loader, sampler and data that the user gave for a split; None for each that is made here."""

    loader: Any
    sampler: Any
    data: Any
    """Its data set, or the loader itself where that has none."""
    workers: int
    """Other processes that read it."""


class GivenData:
    """All that the user gave, looked at anew at each call, since it may still be changed.

    Args:
        splits: returns what is there now, by split.
        is_main: whether this is rank 0, whose facts a checkpoint holds; those that may differ between ranks are of it.
    """

    def __init__(self, splits: Callable[[], Mapping[str, GivenSplit]], *, is_main: bool) -> None:
        self._splits = splits
        self._is_main = is_main
        self._facts: dict[str, dict[str, Any]] | None = None
        self._noted: dict[str, Mapping[str, Any]] = {}

    def positioned(self) -> list[Any]:
        """Return the loaders and iterable data sets, whose position is saved as a stream's."""
        found = self._splits().values()
        data = [each.data for each in found if isinstance(each.data, IterableDataset)]
        return [*(each.loader for each in found if each.loader is not None), *data]

    def stateful(self) -> dict[str, Any]:
        """Return samplers and iterable data, which may have a state of their own, by the runner's attributes."""
        found: dict[str, Any] = {}
        for split, (loader, sampler, data, _) in self._splits().items():
            for name, each in (
                ("datasamplers", sampler),
                ("sampler", getattr(loader, "sampler", None)),
                ("batch_sampler", getattr(loader, "batch_sampler", None)),
                ("datasets", data if isinstance(data, IterableDataset) else None),
            ):
                if each is not None:
                    found[f"{name}[{split!r}]"] = each
        return found

    def generators(self) -> dict[str, Kinds]:
        """Return the generators that map-style data sets and their transforms hold in this process, by their path.

        Those of iterable data, and in loader workers, are seeded by pass and sample instead.
        """
        return {
            f"{split}.{path}": generator
            for split, given in self._splits().items()
            if not isinstance(given.data, IterableDataset)
            for path, generator in find_generators(given.data).items()
        }

    def uncovered_generators(self) -> list[str]:
        """Return generators in the workers of the user's own loaders, which nobody seeds or saves."""
        return [
            f"{split}.{path}"
            for split, given in self._splits().items()
            if isinstance(given.loader, DataLoader) and given.workers > 0
            for path in find_generators(given.loader.dataset)
        ]

    def unseeded(self) -> dict[str, str]:
        """Return the path to a generator that nobody seeded, by split, of those that hold one."""
        found = {split: unseeded_in(given.data) for split, given in self._splits().items()}
        return {split: path for split, path in found.items() if path is not None}

    def read_by_workers(self) -> dict[str, Any]:
        """Return the map-style data sets that other processes read, by split."""
        return {
            split: given.data
            for split, given in self._splits().items()
            if given.workers and given.loader is None and not isinstance(given.data, IterableDataset)
        }

    def facts(self) -> dict[str, dict[str, Any]]:
        """Return what is known of each split's data; see `facts_of`. Found once: files of data that other processes
        read must not be opened here before these are forked."""
        if self._facts is None:
            self._facts = {
                split: {
                    **facts_of(given.data, with_samples=given.workers == 0),
                    **self._noted.get(split, {}),
                }
                for split, given in self._splits().items()
            }
            for split, data in self.read_by_workers().items() if self._is_main else ():
                # by which the workers seed them for each sample
                seeds = {path: first_seed(each) for path, each in find_generators(data).items()}
                self._facts[split]["seeds"] = derive_seed(repr(seeds)) if seeds else None
        return self._facts

    def note(self, split: str, found: Mapping[str, Any]) -> None:
        """Take over more facts of a split, such as a trial finds."""
        self._noted[split], self._facts = found, None
