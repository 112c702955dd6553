"""One real Prefect server for all tests that need one; loaded as a plugin by conftest."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
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
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A Prefect server over a database of its own; flows called in tests use it, without heartbeats."""
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_LOGGING_TO_API_ENABLED,
        temporary_settings,
    )

    from flows.server import EmbeddedServer, send_waiting

    home = tmp_path_factory.mktemp("prefect-home")
    server = EmbeddedServer()
    with pytest.MonkeyPatch.context() as patch, _migrated(home, tmp_path_factory):
        patch.setenv("PREFECT_HOME", str(home))
        server.start()
        api_url = server.wait()
    try:
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


@contextlib.contextmanager
def _migrated(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Inside, start a server over `home`: the migrations of its database, which take seconds, are made by the first of
    the test processes, and copied by the others.
    """
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp()
    template = (base.parent if is_worker else base) / "prefect-template.db"
    with FileLock(template.with_suffix(".lock")):
        if template.exists():
            shutil.copy(template, home / "prefect.db")
        yield
        if not template.exists():
            with (
                contextlib.closing(sqlite3.connect(home / "prefect.db")) as source,
                contextlib.closing(sqlite3.connect(template)) as copy,
            ):
                source.backup(copy)


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
