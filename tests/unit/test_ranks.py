"""The harness of tests with ranks: a rank that fails is told, and the next test gets ranks that live."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.ranks import RankFailed, Ranks, ranks


@pytest.fixture(scope="module")
def group() -> Iterator[Ranks]:
    with ranks(2) as group:
        yield group


def place() -> str:
    return os.environ["RANK"]


def fail(rank: str) -> None:
    if place() == rank:
        raise ValueError("the loss is a fish")


def die(rank: str) -> None:
    if place() == rank:
        os._exit(3)


def unpicklable() -> object:
    return lambda: None


def test_what_ranks_return_comes_by_rank(group: Ranks) -> None:
    assert group.run(place) == ["0", "1"]


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        (fail, ["1"], "rank 1 failed(.|\n)*a fish"),
        (die, ["0"], "rank 0 ended with 3"),
        (unpicklable, [], "pickle"),
    ],
)
def test_the_rank_that_failed_is_told_and_the_next_call_has_others(
    group: Ranks, function: object, arguments: list[str], said: str
) -> None:
    with pytest.raises(RankFailed, match=said):
        group.run(function, *arguments)  # type: ignore[arg-type]
    assert group.run(place) == ["0", "1"]
