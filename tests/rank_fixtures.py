"""Process groups that the tests of the runner share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import Ranks, ranks


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    with ranks(2) as group:
        yield group


@pytest.fixture(scope="session")
def three_ranks() -> Iterator[Ranks]:
    with ranks(3) as group:
        yield group
