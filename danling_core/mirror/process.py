"""Rank 0's side of the mirror: starts its process, asks it for syncs, and learns what became of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from danling_core.errors import Fenced, StoreUnavailable
from danling_core.mirror.layout import STATE_FILE
from danling_core.mirror.service import FENCED, OK
from danling_core.python_path import python_path
from danling_core.runs.folder import CHECKPOINTS


class MirrorProcess:
    """A running mirror. Rank 0 only; any thread may call its methods. Close it, or use it as a context.

    Args:
        local: the working folder.
        remote: URL of the run folder.
        lease_url: of the run's lease (`Lease.url`), with `generation`: the mirror stops once it is fenced.
        generation: of the lease.
        storage_options: as in the config; nothing secret.
        checkpoints: the name of the checkpoints' folder.
        interval_seconds: between passes without a request.
        drain_seconds: how long it may go on delivering after `close`, or after this process died.
    """

    def __init__(
        self,
        local: str,
        remote: str,
        *,
        lease_url: str | None = None,
        generation: int = 1,
        storage_options: Mapping[str, Any] | None = None,
        checkpoints: str = CHECKPOINTS,
        interval_seconds: float = 30.0,
        drain_seconds: float = 600.0,
    ) -> None:
        command = [sys.executable, "-P", "-m", "danling_core.mirror", "--local", local, "--remote", remote]
        command += ["--checkpoints", checkpoints]
        command += ["--storage-options", json.dumps(dict(storage_options or {}))]
        command += ["--interval-seconds", str(interval_seconds), "--drain-seconds", str(drain_seconds)]
        if lease_url is not None:
            command += ["--lease", lease_url, "--generation", str(generation)]
        self._local = local
        self._remote = remote
        self._asked = 0
        self._answered = 0
        self._changed = threading.Condition()
        self._log = os.path.join(local, ".mirror.log")
        self._log_began_at = os.path.getsize(self._log) if os.path.exists(self._log) else 0
        self._process = _start(command, self._log)
        self._reader = threading.Thread(target=self._read_replies, name="danling-mirror", daemon=True)
        self._reader.start()

    def __enter__(self) -> MirrorProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def request_soon(self) -> None:
        """Ask for an early pass without TensorBoard's files, and do not wait: for every epoch's end."""
        self._send("soon")

    def request_sync(self) -> None:
        """Ask for everything that exists now."""
        with self._changed:
            self._asked += 1
            self._send("sync")

    def wait_synced(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the latest sync that was asked for is done; False at the timeout.

        Raises:
            Fenced: another process owns the run.
            StoreUnavailable: the mirror's process ended.
        """
        with self._changed:
            wanted = self._asked
            self._changed.wait_for(lambda: self._answered >= wanted or self._has_ended, timeout_seconds)
            if self._answered >= wanted:
                return True
        if self._has_ended:
            self._raise_for(self._process.wait())
        return False

    def failure(self) -> Fenced | StoreUnavailable | None:
        """Why it ended before it was closed: `Fenced`, or whatever else; None while it lives."""
        if self._process.poll() is None:
            return None
        self._reader.join()
        try:
            self._raise_for(self._process.returncode or -1)
        except (Fenced, StoreUnavailable) as error:
            return error
        raise AssertionError("a code that is not 0 is a failure")

    def state(self) -> dict[str, Any]:
        """Return `mirror.json`: synced_at, pending_bytes, committed ({record, at}), error; `{}` at first."""
        try:
            with open(os.path.join(self._local, STATE_FILE), encoding="utf-8") as file:
                return dict(json.load(file))
        except FileNotFoundError:
            return {}

    def close(self, timeout_seconds: float | None = None) -> None:
        """End the input and wait until everything is up.

        Raises:
            Fenced: another process owns the run.
            StoreUnavailable: not everything is up: the store stayed away, or the time was too short.
        """
        self._send("end")  # a fork, such as a loader's worker, may hold the pipe open: its end is no message
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it ended before; its exit code tells
                self._process.stdin.close()
        try:
            code = self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired as error:
            raise StoreUnavailable(
                f"{self._remote} does not have everything after {timeout_seconds} s"
            ) from error
        self._reader.join()
        self._raise_for(code)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def _has_ended(self) -> bool:
        return not self._reader.is_alive()

    def _raise_for(self, code: int) -> None:
        error = self.state().get("error") or self._last_words()
        if code == FENCED:
            raise Fenced(error)
        if code != OK or self._answered < self._asked:
            raise StoreUnavailable(
                f"the mirror to {self._remote} ended with code {code} before everything was up: {error}; "
                f"the rest is in {self._local}"
            )

    def _last_words(self) -> str:
        try:
            with open(self._log, "rb") as file:
                file.seek(self._log_began_at)
                lines = file.read().decode("utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return f"{self._log} is gone"
        return f"{lines[-1]} (more in {self._log})" if lines else "it said nothing"

    def _send(self, line: str) -> None:
        stdin = self._process.stdin
        if stdin is None or stdin.closed:
            return
        try:
            stdin.write(line + "\n")
            stdin.flush()
        except BrokenPipeError:  # it ended; `wait_synced` and `close` raise
            return

    def _read_replies(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word, _, number = line.strip().partition(" ")
            if word == "ok":
                with self._changed:
                    self._answered = int(number)
                    self._changed.notify_all()
        self._process.stdout.close()
        threading.Thread(target=self._tell_of_end, daemon=True).start()

    def _tell_of_end(self) -> None:
        self._reader.join()
        with self._changed:
            self._changed.notify_all()


def _start(command: list[str], log: str) -> subprocess.Popen[str]:
    """Start it in a session of its own: signals to the ranks do not reach it, and it holds none of their pipes."""
    with open(log, "ab") as errors:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": python_path(os.environ)},
            text=True,
            start_new_session=True,
        )
