"""Reading samples: whole tensors by index, `__getitems__`, and seeded reading in loader workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate, get_worker_info

from danling_core.data.generators import Kinds, find_generators, first_seed, seed_generator
from danling_core.data.given import set_epoch
from danling_core.data.seeded import derive_seed, seed_generators
from danling_core.errors import ConfigError


class PassClock:
    """The pass number and the global batches to skip, readable in loader workers (also persistent ones)."""

    def __init__(self, shared: bool) -> None:
        self._cells = torch.zeros(2, dtype=torch.int64)
        if shared:
            self._cells.share_memory_()

    def set(self, number: int, skip: int = 0) -> None:
        """Set the pass, and how many batches of it to skip. The rank calls it before it makes an iterator."""
        self._cells[0] = number
        self._cells[1] = skip

    def read(self) -> tuple[int, int]:
        """Return the pass and the batches to skip."""
        number, skip = self._cells.tolist()
        return number, skip


class TensorBatches(Dataset[Any]):
    """Whole tensors, read by batch: `index_select` on each, and no collate.

    Args:
        tensors: tensors of equal first dimension: one, a sequence, or a mapping. A batch has the same form, a
            sequence becoming a list, as torch's own collate makes it.
        indices: where given, the samples (of the tensors) that make up this data set.
    """

    def __init__(self, tensors: Any, indices: torch.Tensor | None = None) -> None:
        self.tensors = tensors
        self.indices = indices
        whole = [tensors] if isinstance(tensors, torch.Tensor) else _values(tensors)
        if len({len(tensor) for tensor in whole}) != 1:
            sizes = [len(tensor) for tensor in whole]
            raise ConfigError(f"tensors that make up a data set need equal first dimensions, found {sizes}")
        self.length = len(whole[0]) if indices is None else len(indices)
        self.device = whole[0].device
        self._on_device = self.device.type != "cpu"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self._pick(lambda tensor: tensor[index if self.indices is None else self.indices[index]])

    def __getitems__(self, indices: Sequence[int] | torch.Tensor) -> Any:
        rows = indices if isinstance(indices, torch.Tensor) else torch.tensor(indices)
        if self.indices is not None:
            rows = self.indices.index_select(0, rows)
        if self._on_device:
            rows = rows.to(self.device)
        tensors = self.tensors
        if type(tensors) is tuple:
            return [tensor.index_select(0, rows) for tensor in tensors]
        return self._pick(lambda tensor: tensor.index_select(0, rows))

    def _pick(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        if isinstance(self.tensors, torch.Tensor):
            return pick(self.tensors)
        if isinstance(self.tensors, Mapping):
            return {key: pick(tensor) for key, tensor in self.tensors.items()}
        return [pick(tensor) for tensor in self.tensors]


def as_tensor_batches(dataset: Any) -> TensorBatches | None:
    """Return the data set as whole tensors, where it is one: a tensor, a tuple or mapping of tensors, torch's
    `TensorDataset` (or a subclass that reads like it), or a `Subset` of one of those. Otherwise None."""
    if type(dataset) is Subset:
        inner = as_tensor_batches(dataset.dataset)
        if inner is None:
            return None
        rows = torch.as_tensor(dataset.indices, dtype=torch.int64)
        return TensorBatches(inner.tensors, rows if inner.indices is None else inner.indices[rows])
    if isinstance(dataset, TensorDataset):
        reads = ("__getitem__", "__getitems__", "__len__")
        is_plain = all(getattr(type(dataset), n, None) is getattr(TensorDataset, n, None) for n in reads)
        return TensorBatches(tuple(dataset.tensors)) if is_plain else None
    if isinstance(dataset, torch.Tensor):
        return TensorBatches(dataset)
    values = _values(dataset) if isinstance(dataset, (tuple, Mapping)) else []
    whole = bool(values) and all(isinstance(value, torch.Tensor) for value in values)
    return TensorBatches(dataset) if whole else None


class SeededSamples(Dataset[Any]):
    """A map-style data set as a loader worker reads it: every sample is a function of (seed, pass, index).

    Python's, NumPy's and torch's generators, and those that the data set and its transforms hold, are seeded before
    each sample, or, where the data set has `__getitems__`, before each batch by its first index. Outside a worker
    nothing is seeded: there the rank's own generators serve.
    """

    def __init__(self, dataset: Any, seed: int, clock: PassClock) -> None:
        self.dataset = dataset
        self.seed = seed
        self.clock = clock
        self._told: int | None = None
        self._generators: list[tuple[Kinds, int]] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        number = self._pass()
        many = getattr(self.dataset, "__getitems__", None)
        if many is not None:
            self._seed(number, indices[0])
            return many(indices)
        samples = []
        for index in indices:
            self._seed(number, index)
            samples.append(self.dataset[index])
        return samples

    def _pass(self) -> int:
        number, _ = self.clock.read()
        if number != self._told:
            set_epoch(self.dataset, number)
            self._told = number
        return number

    def _seed(self, number: int, index: Any) -> None:
        if get_worker_info() is None:
            return
        seed_generators(derive_seed("sample", self.seed, number, repr(index)))
        if self._generators is None:
            self._generators = [(each, first_seed(each)) for each in find_generators(self.dataset).values()]
        for generator, first in self._generators:  # else all workers, and all epochs, would draw the same
            seed_generator(generator, derive_seed("sample", first, number, repr(index)))


def collate_samples(fetched: Any) -> Any:
    """Collate a list of samples, which is torch's contract for `__getitems__`; anything else is a ready
    batch."""
    return default_collate(fetched) if type(fetched) is list else fetched


def ready(batch: Any) -> Any:
    """Return the collate of data that is fetched by batch: nothing is left to do."""
    return batch


def _values(tensors: Any) -> list[torch.Tensor]:
    return list(tensors.values() if isinstance(tensors, Mapping) else tensors)
