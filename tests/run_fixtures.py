"""What tests of whole runs share: one launcher, which takes 2.5 s to start, and the runs that nothing disturbed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from danling_core.launch.client import Launcher
    from tests.whole_runs import Ended


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    from danling_core.launch.client import Launcher

    with Launcher() as launcher:
        yield launcher


@pytest.fixture(scope="session")
def in_peace_with(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ended]:
    """The undisturbed run of `whole_runs.config` with these fields, on the local disk, made once."""
    from tests.whole_runs import config, launch

    ended: dict[str, Ended] = {}

    def get(**fields: Any) -> Ended:
        key = json.dumps(fields, sort_keys=True)
        if key not in ended:
            ended[key] = launch(launcher, config(tmp_path_factory.mktemp("in_peace"), **fields))
            outcome = ended[key].outcome
            assert outcome is not None and (outcome.status, outcome.restarts) == ("complete", 0)
        return ended[key]

    return get


@pytest.fixture(scope="session")
def in_peace(in_peace_with: Callable[..., Ended]) -> Ended:
    """The run that every field of `whole_runs.config` is left alone in."""
    return in_peace_with()
