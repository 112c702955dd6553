"""Objects that a training split's stream is made of: what it was when training began, and what it is now."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, IterableDataset, TensorDataset


class Source:
    """The loader, sampler and data set of a split, as they are when this is made.

    Args:
        loader: the user's own, or None.
        sampler: likewise.
        dataset: where there is no loader of the user's own.
    """

    def __init__(self, loader: Any, sampler: Any, dataset: Any) -> None:
        data = dataset if loader is None else None
        data = loader.dataset if isinstance(loader, DataLoader) else data
        parts = data.tensors if isinstance(data, TensorDataset) else [getattr(data, "indices", None)]
        self._held = {
            "the loader": [loader],
            "the sampler": [sampler],
            "the data set": [data],
            "the content": [*parts],
        }
        is_sized = hasattr(data, "__len__") and not isinstance(data, IterableDataset)
        self._length = len(data) if is_sized else None  # type: ignore[arg-type]

    def what_differs(self, now: Source) -> str | None:
        """Return which part is another object now, or that the length is another; None where all is the same."""
        for name, held in self._held.items():
            found = now._held[name]
            if len(held) != len(found) or any(a is not b for a, b in zip(held, found, strict=True)):
                return name
        return None if self._length == now._length else "the length"
