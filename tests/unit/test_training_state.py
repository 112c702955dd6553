"""Parts of a training that are registered: whose state is saved, and who takes over what."""

from __future__ import annotations

from typing import Any

import pytest

from danling_core.errors import CheckpointError
from danling_core.train.state import Order, TrainingState


class Counter:
    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def _ranks(count: int, **options: Any) -> tuple[list[TrainingState], list[Counter]]:
    """Return a state for each rank, in which a counter that begins at 10 times the rank is registered."""
    states, counters = [TrainingState() for _ in range(count)], [Counter(10 * rank) for rank in range(count)]
    for state, counter in zip(states, counters, strict=True):
        state.register("counter", counter, **options)
    return states, counters


def _resume(saved: list[TrainingState], into: list[TrainingState], **options: Any) -> None:
    shared, own = saved[0].shared_state(), [state.rank_state() for state in saved]
    for rank, state in enumerate(into):
        state.load_shared(shared, **options)
        state.load_rank(own, rank, len(into), **options)


def test_each_rank_takes_over_its_own() -> None:
    saved, _ = _ranks(3)
    resumed, counters = _ranks(3)
    for counter in counters:
        counter.value = -1
    _resume(saved, resumed)
    assert [counter.value for counter in counters] == [0, 10, 20]


def test_what_is_shared_is_saved_once() -> None:
    saved, _ = _ranks(2, shared=True)
    assert "counter" in saved[0].shared_state() and "counter" not in saved[1].rank_state()
    resumed, counters = _ranks(2, shared=True)
    _resume(saved, resumed)
    assert [counter.value for counter in counters] == [0, 0]


@pytest.mark.parametrize("count", [1, 3])
def test_with_another_world_size_all_take_over_that_of_rank_0(count: int) -> None:
    saved, before = _ranks(2)
    before[0].value = 7
    resumed, counters = _ranks(count)
    _resume(saved, resumed)
    assert [counter.value for counter in counters] == [7] * count


def test_with_another_world_size_a_merge_is_given_the_states_of_all() -> None:
    saved, _ = _ranks(3)
    given: list[Any] = []
    resumed, _ = _ranks(2, merge=given.append)
    _resume(saved, resumed)
    assert given == [[{"value": 0}, {"value": 10}, {"value": 20}]] * 2


def test_a_part_is_restored_with_the_weights_unless_another_order_is_stated() -> None:
    for options, expected in (({}, [0, 10]), ({"order": Order.counters}, [-1, -1])):
        saved, _ = _ranks(2, **options)
        resumed, counters = _ranks(2, **options)
        for counter in counters:
            counter.value = -1
        _resume(saved, resumed, up_to=Order.weights)
        assert [counter.value for counter in counters] == expected


@pytest.mark.parametrize("shared", [True, False])
def test_a_checkpoint_without_the_part_leaves_it_as_it_is(shared: bool) -> None:
    resumed, counters = _ranks(2, shared=shared)
    _resume([TrainingState(), TrainingState()], resumed)
    assert [counter.value for counter in counters] == [0, 10]


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (True, True), (False, False)])
def test_a_name_is_taken_once(first: bool, second: bool) -> None:
    state = TrainingState()
    state.register("mine", Counter(), shared=first)
    with pytest.raises(CheckpointError, match="'mine' already: choose another name"):
        state.register("mine", Counter(), shared=second)
