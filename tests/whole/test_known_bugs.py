"""Real processes for what tests/unit/test_known_bugs.py tries without them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from danling_core.data import to_device
from tests.marks import rarely
from tests.ranks import Ranks
from tests.small_runner import SmallRunner, config
from tests.unit.test_known_bugs import Plain


class MadeInAWorker(torch.utils.data.Dataset[Any]):
    """Tells where its samples were made."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        in_worker = torch.utils.data.get_worker_info() is not None
        return torch.full((2,), float(in_worker)), torch.tensor(index % 2)


@pytest.mark.holds("bugs-10")
def test_loader_workers_move_nothing_to_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []

    def watched(batch: Any, device: torch.device, **named: Any) -> Any:
        if torch.utils.data.get_worker_info() is not None:
            raise AssertionError("a loader worker moves a batch")
        moved.append(len(batch[0]))
        return to_device(batch, device, **named)

    for name, module in list(sys.modules.items()):  # workers are forks of this process
        if name.startswith("danling_core") and vars(module).get("to_device") is to_device:
            monkeypatch.setattr(module, "to_device", watched)
    loader = {"batch_size": 4, "num_workers": 1}
    runner = SmallRunner(config(tmp_path, epoch_end=1, dataloader=loader))
    runner.datasets = {"train": MadeInAWorker(), "val": MadeInAWorker()}
    inputs: list[float] = []
    runner.model.register_forward_pre_hook(lambda _, given: inputs.extend(given[0].flatten().tolist()))
    runner.train()
    assert moved and set(inputs) == {1.0}  # made in a worker, moved by the rank


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts collectives and reads of tensors by the host; `item` of a loss on the CPU waits for nothing."""
    calls: Counter[str] = Counter()
    collectives = (
        "all_reduce",
        "broadcast",
        "all_gather_object",
        "gather_object",
        "broadcast_object_list",
        "barrier",
    )
    places = [(dist, name) for name in collectives]
    places += [(torch.Tensor, name) for name in ("tolist", "cpu", "numpy", "__bool__", "__float__")]
    originals = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, original in originals:

        def count(*given: Any, _name: str = name, _original: Any = original, **named: Any) -> Any:
            calls[_name] += 1
            return _original(*given, **named)

        setattr(place, name, count)
    try:
        yield calls
    finally:
        for place, name, original in originals:
            setattr(place, name, original)


def calls_of(root: str, batches: int, **fields: Any) -> Counter[str]:
    params = {"samples": 10 * batches, "val_samples": 4}
    runner = Plain(config(root, params=params, epoch_end=1, log_interval=10_000, **fields))
    with counted() as calls:
        runner.train()
    return calls


@pytest.mark.holds("bugs-11")
@pytest.mark.parametrize(
    "fields",
    [
        *rarely([{}, {"accum_steps": 2}]),
        {"clip_grad_norm": 1.0, "ema_decay": 0.9, "scheduler": {"name": "linear"}},
    ],
)
def test_a_step_costs_no_collective_and_no_host_sync_beyond_ddp(
    fields: dict[str, Any], two_ranks: Ranks, tmp_path: Path
) -> None:
    few = two_ranks.run(calls_of, str(tmp_path / "few"), 4, **fields)
    many = two_ranks.run(calls_of, str(tmp_path / "many"), 40, **fields)
    for some, more in zip(few, many, strict=True):
        # results, status and checkpoint of the one epoch are all there is
        assert {name: more[name] - some[name] for name in more} == dict.fromkeys(more, 0)
        assert sum(some.values()) > 0
