"""Unit tests start no process but git, which the code under test asks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from danling_core.runner import aside


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that starts a process: it belongs into tests/whole."""
    start = subprocess.Popen.__init__

    def refuse(self: Any, command: Any, *options: Any, **named: Any) -> None:
        program = command if isinstance(command, str) else command[0]
        if os.path.basename(program) not in ("git", "uname"):
            pytest.fail(f"a unit test starts {program}: move it to tests/whole")
        start(self, command, *options, **named)

    def refuse_fork() -> int:
        pytest.fail("a unit test forks: move it to tests/whole")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(os, "fork", refuse_fork)
    monkeypatch.setattr(aside, "can_fork", lambda device: False)  # the look is taken on copies here
    yield
