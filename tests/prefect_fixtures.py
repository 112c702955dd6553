"""One real Prefect server for all tests that need one; loaded as a plugin by conftest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock


def _forget_exit_hooks() -> None:
    """Prefect's hooks wait at exit for threads that a forked child does not have, and the child fails."""
    threading._threading_atexits.clear()  # type: ignore[attr-defined]


# Tests of other modules fork this process: loader workers, processes that contend for a lease.
os.register_at_fork(after_in_child=_forget_exit_hooks)


@dataclass(frozen=True)
class PrefectServer:
    """A running server: its API's URL, and what a child process needs in its environment to use it."""

    api_url: str
    environment: dict[str, str]

    def client(self) -> Any:
        """A synchronous client, for use in a `with`."""
        from prefect.client.orchestration import SyncPrefectClient

        return SyncPrefectClient(self.api_url)


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of Prefect's server. Its migrations take seconds: one test process makes them for all."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if is_worker else base) / "migrated-prefect-home"
    is_made = home / "made"
    with FileLock(f"{home}.lock"):
        if not is_made.exists():
            command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
            subprocess.run(
                command, env={**os.environ, "PREFECT_HOME": str(home)}, check=True, capture_output=True
            )
            is_made.touch()
    return home / "prefect.db"


@pytest.fixture(scope="session")
def prefect_server(
    tmp_path_factory: pytest.TempPathFactory, migrated_database: Path
) -> Iterator[PrefectServer]:
    """A Prefect server over a database of its own; flows called in tests use it, without heartbeats."""
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_LOGGING_TO_API_ENABLED,
        temporary_settings,
    )

    from flows.server import EmbeddedServer, send_waiting

    home = tmp_path_factory.mktemp("prefect-home")
    shutil.copy(migrated_database, home / "prefect.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        server = EmbeddedServer()
        server.start()
    try:
        api_url = server.wait()
        environment = {**os.environ, "PREFECT_API_URL": api_url, "PREFECT_HOME": str(home)}
        changes = {
            PREFECT_API_URL: api_url,
            PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
            PREFECT_LOGGING_TO_API_ENABLED: False,
        }
        with temporary_settings(changes):
            yield PrefectServer(api_url, environment)
            send_waiting()
    finally:
        server.stop()


@pytest.fixture
def prefect_home(migrated_database: Path, tmp_path: Path) -> Path:
    """A Prefect home of the test's own; a server over it starts at once."""
    home = tmp_path / "prefect-home"
    home.mkdir()
    shutil.copy(migrated_database, home / "prefect.db")
    return home


@pytest.fixture
def toy_config(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Makes the config of a toy run in a folder of the test's own; arguments change it."""

    def make(**changes: Any) -> dict[str, Any]:
        params = {"width": 4, **changes.pop("params", {})}
        return {
            "experiment_name": "toy",
            "runner": "tests.toy_runner:ToyRunner",
            "project_root": str(tmp_path / "experiments"),
            "epoch_end": 2,
            "score_name": "accuracy",
            "nproc_per_node": 1,
            "device": "cpu",
            "params": params,
            **changes,
        }

    return make
