"""Every crash point of the protocols, on disk and in stores: what must hold does. See docs/crash-points.md."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from tests.explorer.spaces import SPACES, Space, explore

IN_SHORT = [space for space in SPACES if space.place != "GCS"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Silence the log of thousands of runs, and keep to one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("space", IN_SHORT, ids=lambda space: space.name)
def test_no_disturbance_breaks_what_must_hold(space: Space) -> None:
    found = explore(space, space.stride)
    assert sum(found.counts.values()) > 2 and not found.broken


@pytest.mark.long
@pytest.mark.parametrize(
    ("space", "part", "parts"),
    [
        pytest.param(space, part, parts, id=f"{space.name}, part {part + 1} of {parts}")
        for space in SPACES
        if space.stride > 1
        for parts in [8 if space.stride >= 100 else 1]
        for part in range(parts)
    ],
)
def test_no_disturbance_at_all_breaks_what_must_hold(space: Space, part: int, parts: int) -> None:
    found = explore(space, stride=parts, offset=part)
    assert found.counts and not found.broken
