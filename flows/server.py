"""The Prefect API that a command uses: the one that is configured, or an embedded server for its duration."""

from __future__ import annotations

import base64
import contextlib
import contextvars
import http.client
import logging
import os
import secrets
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import IO, Any
from uuid import UUID

from danling_core.errors import DanLingError
from danling_core.parallel import loopback
from danling_core.process_tree import END
from danling_core.python_path import python_path

logger = logging.getLogger("danling.flows")

# Nothing is sent to the outside unless the user has said otherwise.
QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}

_SERVER = {
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_UI_ENABLED": "0",
    "PREFECT_LOGGING_SERVER_LEVEL": "ERROR",
}

_PROBE_SECONDS = 5.0


class ServerError(DanLingError):
    """The embedded server did not start; the message ends with what it said."""


class EmbeddedServer:
    """A Prefect server on a free local port, over the database of the user's Prefect home.

    `start` returns at once, so that the server (5 to 9 s) comes up while other things are prepared; `wait`
    blocks. The server ends with this process, however that ends, but not with a signal that stops the runs: they are
    to report their end to it.

    Args:
        auth: `name:password` that its clients must give; None lets every user of this machine in.
    """

    def __init__(self, auth: str | None = None) -> None:
        self.auth = auth
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = None
        self.api_url = ""

    def start(self, port: int = 0) -> None:
        """Start the process, on a free port or `port`. It dies with the calling thread, which has to live as long."""
        with loopback.listen(port) as listener:
            host, port = loopback.address(listener)
            self.api_url = f"http://{f'[{host}]' if ':' in host else host}:{port}/api"
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flows.embedded_server", str(listener.fileno())],
                env={
                    **os.environ,
                    **QUIET,
                    **_SERVER,
                    **({} if self.auth is None else {"PREFECT_SERVER_API_AUTH_STRING": self.auth}),
                    "PYTHONPATH": python_path(os.environ),
                },
                pass_fds=(listener.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
            )

    def wait(self, timeout_seconds: float = 120.0) -> str:
        """Wait until the server answers; its API's URL.

        Raises:
            ServerError: it ended, or did not answer in time.
        """
        end = time.monotonic() + timeout_seconds
        while time.monotonic() < end:
            if self._process is None or self._process.poll() is not None:
                raise ServerError(f"the embedded Prefect server ended before it was ready:\n{self._tail()}")
            if _is_healthy(self.api_url):
                return self.api_url
            time.sleep(0.05)
        raise ServerError(
            f"the embedded Prefect server did not answer in {timeout_seconds:g} s:\n{self._tail()}"
        )

    def stop(self, timeout_seconds: float = 15.0) -> None:
        """End the process, at first politely: it writes what it still holds."""
        if self._process is None:
            return
        self._process.send_signal(END)
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        self._log.close()

    def _tail(self, size: int = 2000) -> str:
        self._log.seek(0)
        return self._log.read()[-size:].decode(errors="replace")


@contextlib.contextmanager
def api_server() -> Iterator[EmbeddedServer | str]:
    """Yield the URL of the API that Prefect's settings name (environment, active profile), or a server starting up.

    Where the configured one cannot be used, a server too, with a warning: training does not depend on it.
    """
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if url is not None and (reason := why_unusable(url)) is not None:
        logger.warning(
            "PREFECT_API_URL is %s, which cannot be used (%s): going on with a server of this command's own. "
            "Start that one, or forget it: prefect config unset PREFECT_API_URL",
            *(url, reason),
        )
        url = None
    if url is not None:
        yield url
        return
    server = EmbeddedServer(auth=f"danling:{secrets.token_urlsafe(32)}")
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def using_api(server: EmbeddedServer | str) -> Iterator[None]:
    """Have flows called inside talk to a server, once it answers, or to the API at a URL; without heartbeats."""
    from prefect.settings import (
        PREFECT_API_AUTH_STRING,
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        temporary_settings,
    )

    settings: dict[Any, Any] = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    if isinstance(server, str):
        settings[PREFECT_API_URL] = server
    else:
        settings |= {PREFECT_API_URL: server.wait(), PREFECT_API_AUTH_STRING: server.auth}
    with temporary_settings(settings):
        yield


def send_waiting(timeout_seconds: float = 10.0) -> bool:
    """Send the events (a task run's states are events) and logs that Prefect's threads still hold.

    False when they were not sent in time; then Prefect would go on trying at the exit of the interpreter.
    """
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    def drain() -> None:
        for worker in (EventsWorker, APILogWorker):
            worker.drain_all(at_exit=False)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(drain,), daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    return not thread.is_alive()


def why_unreachable(api_url: str, timeout_seconds: float = _PROBE_SECONDS) -> str | None:
    """Return why an API is taken for away: anything but a healthy answer; None where it is healthy."""
    return _why_not(f"{api_url}/health", timeout_seconds)


def why_unusable(api_url: str) -> str | None:
    """Return why an API is away, or does not let us in; None where it can be used."""
    return why_unreachable(api_url) or why_refused(api_url)


def why_refused(api_url: str, timeout_seconds: float = _PROBE_SECONDS) -> str | None:
    """Return why an API does not let us in with the password or key of Prefect's settings; None if it does.

    Its health says nothing about that: everybody may ask for it.
    """
    reason = _why_not(
        f"{api_url}/flows/{UUID(int=0)}", timeout_seconds
    )  # no flow has this id: 404 means let in
    if reason is None or not reason.startswith(("it answers 401", "it answers 403")):
        return None
    return f"{reason}: it wants a password (PREFECT_API_AUTH_STRING=name:password) or a key (PREFECT_API_KEY)"


def _why_not(url: str, timeout_seconds: float) -> str | None:
    """Return what a URL answers instead of 200, or why it does not answer."""
    try:
        request = urllib.request.Request(url, headers=_headers())
        with urllib.request.urlopen(request, timeout=timeout_seconds, context=_tls()) as answer:
            return None if answer.status == 200 else f"it answers {answer.status}"
    except urllib.error.HTTPError as error:
        return f"it answers {error.code} {error.reason}"
    except urllib.error.URLError as error:
        return str(error.reason)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__


def _headers() -> dict[str, str]:
    """Return what logs in, as Prefect's own client does."""
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY

    key, auth = PREFECT_API_KEY.value(), PREFECT_API_AUTH_STRING.value()
    if key is not None:
        return {"Authorization": f"Bearer {_revealed(key)}"}
    if auth is None:
        return {}
    return {"Authorization": f"Basic {base64.b64encode(_revealed(auth).encode()).decode()}"}


def _revealed(value: Any) -> str:
    return str(value.get_secret_value() if hasattr(value, "get_secret_value") else value)


def _tls() -> ssl.SSLContext:
    from prefect.settings import PREFECT_API_SSL_CERT_FILE, PREFECT_API_TLS_INSECURE_SKIP_VERIFY

    context = ssl.create_default_context()
    file = PREFECT_API_SSL_CERT_FILE.value()
    if file and os.path.isfile(file):
        context.load_verify_locations(file)
    if PREFECT_API_TLS_INSECURE_SKIP_VERIFY.value():
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _is_healthy(api_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=1.0) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
