"""`danling up`: a Prefect server, a work pool, a worker and this project's deployments, on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO
from urllib.parse import quote

from danling_core.errors import DanLingError
from danling_core.process_tree import children_of, die_with_parent
from danling_core.python_path import python_path
from danling_core.runs.metadata import user_name
from flows import cli_deploy
from flows.cli_text import say
from flows.exit_codes import DONE, FAILED
from flows.server import QUIET, why_refused, why_unreachable
from flows.signals import Signals
from flows.slots import LEASE_STORAGE

_START_SECONDS = 120.0
_SAVE_SECONDS = 60.0  # for the runs at work, when all is taken down
_POLL_SECONDS = 0.5


class UpError(DanLingError):
    """A service did not come up; the message names its log."""


class Services:
    """The processes that one `danling up` has started.

    Args:
        folder: for their logs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lock: IO[str] | None = None

    def claim(self) -> bool:
        """Be the one `danling up` of this Prefect home, until this process ends; return False where another one is."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = (self._folder / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        self._lock = lock  # kept open: closed, it would be given up
        return True

    def start(self, name: str, words: list[str], environment: Mapping[str, str]) -> Path:
        """Start a Python command; return its log. It ends with this process, however that ends."""
        self._folder.mkdir(parents=True, exist_ok=True)
        log = self._folder / f"{name}.log"
        with log.open("ab") as file:
            self._processes[name] = subprocess.Popen(
                [sys.executable, *words],
                env={**os.environ, **QUIET, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(signal.SIGTERM),
            )
        return log

    def ended(self) -> str | None:
        """Return the name of a process that has ended by itself; None while all live."""
        return next((name for name, process in self._processes.items() if process.poll() is not None), None)

    def __len__(self) -> int:
        return len(self._processes)

    def stop(self) -> None:
        """Have the runs at work save and stop, then end the worker, then the server."""
        worker = self._processes.pop("worker", None)
        if worker is not None:
            at_work = children_of(worker.pid)
            for pid in at_work:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            end = time.monotonic() + _SAVE_SECONDS
            while set(children_of(worker.pid)) & set(at_work) and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)
            _end(worker)
        for process in self._processes.values():
            _end(process)


def up(port: int, database: str | None, pool: str, limit: int) -> int:
    """Bring up what is not there yet, say what is, and stay until Ctrl-C."""
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME

    api_url = str(PREFECT_API_URL.value() or f"http://127.0.0.1:{port}/api")
    services = Services(Path(str(PREFECT_HOME.value())) / "danling-up")
    signals = Signals()
    try:
        with signals, _asking(api_url):
            _server(services, api_url, port, database)
            _pool_and_worker(services, api_url, pool, limit)
            _deployments()
            if not services:
                say("\nall of it is there already: there is nothing to stay for")
                return DONE
            say(f"\nin another terminal:  export PREFECT_API_URL={api_url}")
            say("Ctrl-C ends what was started here; runs at work save, and can be resumed")
            with signals.being_noted():
                return _stay(services, signals)
    finally:
        services.stop()


def _server(services: Services, api_url: str, port: int, database: str | None) -> None:
    if why_unreachable(api_url, 2.0) is None:
        _refuse_if_refused(api_url)
        if database is not None:
            say("--database has no effect: the server is there already", file=sys.stderr)
        return _line("server", api_url.removesuffix("/api"), "there already")
    if f":{port}/" not in api_url:
        raise UpError(
            f"PREFECT_API_URL is {api_url}, which cannot be reached: start that server, or unset it"
        )
    environment = {
        "PREFECT_API_URL": api_url,
        "PREFECT__SERVER_FINAL": "1",  # as `prefect server start` has it
        "PYTHONPATH": python_path(os.environ),
        **LEASE_STORAGE,
    }
    if database is not None:
        environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
    # What `prefect server start` serves, with patience for SQLite. -P: not a package `flows` of the user's.
    words = ["-P", "-m", "uvicorn", "flows.server_app:create_app", "--factory", "--log-level", "warning"]
    log = services.start("server", [*words, "--host", "127.0.0.1", "--port", str(port)], environment)
    end = time.monotonic() + _START_SECONDS
    while (reason := why_unreachable(api_url, 2.0)) is not None:
        if services.ended() is not None or time.monotonic() > end:
            said = " ".join(log.read_text(errors="replace").split()[-40:])
            raise UpError(f"the server did not come up ({reason}); its log {log} ends with: {said}")
        time.sleep(_POLL_SECONDS)
    _refuse_if_refused(api_url)
    return _line("server", api_url.removesuffix("/api"), f"started, log {log}")


def _refuse_if_refused(api_url: str) -> None:
    if (reason := why_refused(api_url)) is not None:
        raise UpError(f"{api_url}: {reason}")


def _pool_and_worker(services: Services, api_url: str, pool: str, limit: int) -> None:
    is_made = cli_deploy.ensure_pool(pool)
    _line("work pool", pool, "made" if is_made else "there already")
    name = f"danling-up-{user_name()}-{socket.gethostname()}"
    is_the_one = services.claim()
    online = _workers_online(pool)
    if is_the_one and name in online:
        # It has ended: Prefect counts a worker as there for a minute and a half after it was last heard of.
        _forget_worker(pool, name)
        online.remove(name)
    if online:
        return _line("worker", ", ".join(online), "there already")
    words = [
        "-m",
        "prefect",
        "worker",
        "start",
        "--pool",
        pool,
        "--name",
        name,
        "--limit",
        str(limit),
    ]
    environment = {"PREFECT_API_URL": api_url, "PREFECT_WORKER_QUERY_SECONDS": "1"}
    log = services.start("worker", words, environment)
    end = time.monotonic() + _START_SECONDS
    while not (online := _workers_online(pool)):
        if services.ended() is not None or time.monotonic() > end:
            raise UpError(f"the worker did not come up: see its log {log}")
        time.sleep(_POLL_SECONDS)
    return _line("worker", online[0], f"started, log {log}")


def _deployments() -> None:
    is_made = cli_deploy.ensure_automation()
    _line("automation", "silent runs are crashed", "made" if is_made else "there already")
    if not Path(cli_deploy.FILE).exists():
        return _line(
            "deployments", "none", f"no {cli_deploy.FILE} in this folder: danling deploy FILE, or --example"
        )
    return _line("deployments", ", ".join(cli_deploy.register()), "registered")


def _workers_online(pool: str) -> list[str]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import WorkerStatus

    with get_client(sync_client=True) as client:
        return [
            each.name
            for each in client.read_workers_for_work_pool(pool)
            if each.status == WorkerStatus.ONLINE
        ]


def _forget_worker(pool: str, name: str) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        where = {"work_pool_name": quote(pool), "name": quote(name)}
        client.request("DELETE", "/work_pools/{work_pool_name}/workers/{name}", path_params=where)


def _stay(services: Services, signals: Signals) -> int:
    while not signals.noted:
        if (name := services.ended()) is not None:
            say(f"the {name} has ended: see its log", file=sys.stderr)
            return FAILED
        time.sleep(_POLL_SECONDS)
    say("\nending: runs at work save what they have", file=sys.stderr)
    return DONE


def _line(what: str, name: str, how: str) -> None:
    say(f"{what:12} {name}  ({how})")


@contextlib.contextmanager
def _asking(api_url: str) -> Iterator[None]:
    """Have this process, and Prefect's commands that it runs, ask this API."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    before = os.environ.get("PREFECT_API_URL")
    os.environ["PREFECT_API_URL"] = api_url
    try:
        with temporary_settings({PREFECT_API_URL: api_url}):
            yield
    finally:
        if before is None:
            del os.environ["PREFECT_API_URL"]
        else:
            os.environ["PREFECT_API_URL"] = before


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
