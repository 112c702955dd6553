"""Data that only loader workers may read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.small_runner import weights
from tests.unit.test_data_and_bits import Augmented, Noisy
from tests.unit.test_resume_here import in_peace, resumed


class OpensLate(Noisy):
    """Opens its file at the first sample, as HDF5 must be in each process of its own."""

    opened_by: int | None = None

    def __getitem__(self, index: int) -> Any:
        self.opened_by = self.opened_by or os.getpid()
        assert self.opened_by == os.getpid(), "a file that was opened before the fork"
        return super().__getitem__(index)


class WithWorkers(Augmented):
    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.datasets["train"] = OpensLate()


def test_samples_of_loader_workers_are_read_by_them_alone_and_survive_a_resume(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"epoch_end": 3, "dataloader": {"batch_size": 5, "train": {"num_workers": 2}}}
    peace, again = (
        in_peace(tmp_path, WithWorkers, **fields),
        resumed(tmp_path, ("train", 6), WithWorkers, **fields),
    )
    assert len(set(peace.noises)) == 60
    assert again.noises == peace.noises[-len(again.noises) :] and weights(again) == weights(peace)
