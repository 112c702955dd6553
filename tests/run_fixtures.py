"""What tests of whole runs share: one launcher, which takes 2.5 s to start, and the runs that nothing disturbed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

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


@pytest.fixture
def start_danling(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `danling COMMAND FILE` on a file with the values; what still runs at the end of the test is killed."""
    begun: list[subprocess.Popen[str]] = []

    def start(
        command: str, values: Any, *words: str, environment: Mapping[str, str]
    ) -> subprocess.Popen[str]:
        file = tmp_path / f"{command}.yaml"
        file.write_text(yaml.safe_dump(values))
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", command, str(file), *words],
            cwd=Path(__file__).resolve().parents[1],
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        begun.append(process)
        return process

    yield start
    for process in begun:
        process.kill()
