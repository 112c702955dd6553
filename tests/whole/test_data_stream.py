"""Real processes for what tests/unit/test_data_stream.py tries without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from danling_core.data import TrainStream, build_train_loader
from tests.unit.test_data_stream import (
    SOURCES,
    Numbers,
    Ranks,
    counted,
    options,
    read,
    step,
    windows_per_pass,
)


@pytest.mark.parametrize("stop", [0, 1, 4, 6, 9])
@pytest.mark.parametrize("source", SOURCES)
def test_a_run_stopped_after_any_window_goes_on_with_the_same_batches(source, stop):
    torch.manual_seed(5)
    stream, expected, left = TrainStream(SOURCES[source](), accum_steps=2), [], None
    for _ in range(2):
        for window in stream.windows():
            expected.append(step(window))
            if len(expected) == stop:
                left = stream.state_dict(), torch.get_rng_state()
    assert len(expected) == 12

    stream = TrainStream(SOURCES[source](), accum_steps=2)
    torch.manual_seed(5)
    if left is not None:
        torch.manual_seed(99)
        stream.load_state_dict(left[0])
        stream.take_up()
        torch.set_rng_state(left[1])
    found = [step(window) for _ in range(stream.state_dict()["pass"], 2) for window in stream.windows()]
    assert found == expected[stop:]


def test_the_rest_of_a_pass_can_be_left_out():
    stream, other = (TrainStream(SOURCES["workers"]()) for _ in range(2))
    next(stream.windows())
    stream.end_pass()
    read(other)
    assert read(stream) == read(other)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_of_iterable_data_is_the_same_on_one_and_on_three_ranks(workers):
    def steps(world_size: int, batch_size: int) -> list[set[int]]:
        def body(rank: int, reduce: Any) -> Any:
            data, place = Numbers(40), {"rank": rank, "world_size": world_size}
            loader = build_train_loader(data, options(batch_size, num_workers=workers), seed=1, **place)
            stream = TrainStream(loader, reduce=reduce, **place)
            assert windows_per_pass(stream) is None
            return [{int(sample[0]) for sample in samples} for samples in counted(read(stream))]

        return [set().union(*parts) for parts in zip(*Ranks(world_size).run(body), strict=True)]

    assert steps(3, 2) == steps(1, 6)
