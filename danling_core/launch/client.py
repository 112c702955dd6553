"""The driver's side of launching: start a launcher, prepare configs, run groups of ranks. Loads no torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, BinaryIO, cast

from danling_core.errors import ConfigError, LaunchError
from danling_core.launch.messages import Outcome, Prepared, RunRequest
from danling_core.python_path import python_path
from danling_core.writers.follow import end_of_lines, follow, last_lines

__all__ = ["Launcher", "Outcome", "Prepared", "RunHandle", "RunRequest"]

_Reply = dict[str, Any]
_PREPARE_SECONDS, _PREPARE_SECONDS_EACH = 60.0, 1.0


class RunHandle:
    """A run that a launcher works on. Its methods may be called from any thread."""

    def __init__(
        self, launcher: Launcher, request: RunRequest, request_id: int, reply: Future[_Reply], offset: int
    ) -> None:
        self.request = request
        self._launcher = launcher
        self._id = request_id
        self._reply = reply
        self._offset = offset
        self._is_interrupted = False

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the run's events from its launch on, as they come; ends when the run has."""
        return follow(self.request.events_path, from_offset=self._offset, stop=self._reply.done)

    def outcome(self, timeout_seconds: float | None = None) -> Outcome:
        """Wait for the end of the run.

        Raises:
            LaunchError: the launcher died, or could not launch. The run can be resumed by another one.
            TimeoutError: the run goes on.
        """
        return Outcome(**_checked(self._reply.result(timeout_seconds))["outcome"])

    @property
    def has_ended(self) -> bool:
        """Return whether no rank is left."""
        return self._reply.done()

    def interrupt(self, reason: str = "asked to stop") -> None:
        """Have the ranks save and stop; they are killed after the grace. A second call kills them at once."""
        is_second, self._is_interrupted = self._is_interrupted, True
        if not self._reply.done():
            self._launcher._interrupt(self._id, reason, kill=is_second)


class Launcher:
    """A process that launches ranks fast, for one run after the other; a second one is for a run beside it.

    Ranks and preparations get the environment and working folder that the driver has when it asks. What torch
    reads while it is imported is taken from the environment at the start. The launcher ends when its driver
    does.

    Args:
        env: variables to add to the driver's environment, for the launcher and its ranks; it may be changed
            later, and holds for what is asked then.
        rank_entrypoint: "module:function", called in each rank with (request dict, control path, restart).
        prepare_entrypoint: "module:function", called in a fresh process with (config dict, cwd).
    """

    def __init__(
        self,
        env: Mapping[str, str] | None = None,
        *,
        rank_entrypoint: str = "danling_core.launch.rank:run_launched",
        prepare_entrypoint: str = "danling_core.launch.prepare:prepare",
    ) -> None:
        self.env = dict(env or {})
        self._entrypoints = (rank_entrypoint, prepare_entrypoint)
        self._lock = threading.RLock()
        self._connection: _Connection | None = None

    def start(self) -> None:
        """Start the process, and do not wait for it; nothing if it runs. Every request does so by itself."""
        with self._lock:
            if self._connection is None or not self._connection.is_open:
                self.close()
                self._connection = _Connection(self._environment(), *self._entrypoints)

    def prepare(
        self,
        configs: Sequence[dict[str, Any]],
        cwd: str | None = None,
        timeout_seconds: float | None = None,
    ) -> list[Prepared]:
        """Import the runners of `configs` in a process of their own, and return what they are, in order.

        Args:
            timeout_seconds: for all of them together; None: a minute, and a second for each.

        Raises:
            ConfigError: for the first config that cannot be run, with what the user needs to mend it.
            LaunchError: the launcher died.
        """
        if timeout_seconds is None:
            timeout_seconds = _PREPARE_SECONDS + _PREPARE_SECONDS_EACH * len(configs)
        message = {"op": "prepare", "configs": list(configs), "timeout_seconds": timeout_seconds}
        reply = self._open().send({**message, **self._here(cwd)})[1].result()
        return [Prepared.from_dict(fields) for fields in _checked(reply)["prepared"]]

    def run(self, request: RunRequest, cwd: str | None = None) -> RunHandle:
        """Launch the ranks of one run; returns at once. Requests beyond the first wait for their turn."""
        connection = self._open()
        offset = end_of_lines(request.events_path)  # before anything runs
        message = {"op": "run", "request": request.to_dict()}
        request_id, reply = connection.send({**message, **self._here(cwd)})
        connection.grace_seconds = request.stop_grace_seconds
        return RunHandle(self, request, request_id, reply, offset)

    def close(self) -> None:
        """End the process; a run that goes on is interrupted, with its grace. It can be started again."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    @property
    def pid(self) -> int | None:
        """Pid of the process; None before the start."""
        return None if self._connection is None else self._connection.process.pid

    def _open(self) -> _Connection:
        with self._lock:
            self.start()
            return cast(_Connection, self._connection)

    def _interrupt(self, request_id: int, reason: str, kill: bool) -> None:
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(LaunchError):  # its death reaches the run's outcome by itself
                connection.write({"op": "interrupt", "id": request_id, "reason": reason, "kill": kill})

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.env}

    def _here(self, cwd: str | None) -> dict[str, Any]:
        return {"env": self._environment(), "cwd": os.path.abspath(cwd or os.getcwd())}

    def __enter__(self) -> Launcher:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Connection:
    """One launcher process: its pipes, and the replies that are still to come."""

    def __init__(self, env: dict[str, str], rank_entrypoint: str, prepare_entrypoint: str) -> None:
        self.folder = tempfile.mkdtemp(prefix="danling-", dir=_short_temporary_folder())
        self.stderr_path = os.path.join(self.folder, "stderr.log")
        self.grace_seconds = 0.0
        self.is_open = True
        self._pending: dict[int, Future[_Reply]] = {}
        self._next_id = 0
        self._lock = threading.Lock()
        command = [sys.executable, "-P", "-m", "danling_core.launch", "--folder", self.folder]
        command += ["--rank-entrypoint", rank_entrypoint, "--prepare-entrypoint", prepare_entrypoint]
        with open(self.stderr_path, "wb") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**env, "PYTHONPATH": python_path(env)},
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, name="danling-launcher-replies", daemon=True)
        self._reader.start()

    def send(self, message: dict[str, Any]) -> tuple[int, Future[_Reply]]:
        """Send a request; its id, and the reply to come."""
        reply: Future[_Reply] = Future()
        with self._lock:
            if not self.is_open:
                raise LaunchError(self._epitaph())
            self._next_id += 1
            request_id = self._next_id
            self._pending[request_id] = reply
        self.write({**message, "id": request_id})
        return request_id, reply

    def write(self, message: dict[str, Any]) -> None:
        """Write one line; raises LaunchError if the launcher is gone."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            try:
                stdin = cast(BinaryIO, self.process.stdin)
                stdin.write(line)
                stdin.flush()
            except (OSError, ValueError) as error:
                with contextlib.suppress(subprocess.TimeoutExpired):  # its pipe may close before it has ended
                    self.process.wait(1.0)
                raise LaunchError(self._epitaph()) from error

    def _read(self) -> None:
        with cast(BinaryIO, self.process.stdout) as stdout:
            for line in stdout:
                if not line.endswith(b"\n"):  # the launcher died within it
                    break
                reply = json.loads(line)
                self._pending.pop(reply["id"]).set_result(reply)
        self.process.wait()
        with self._lock:
            self.is_open = False
            pending, self._pending = [*self._pending.values()], {}
        error = self._epitaph()
        for future in pending:
            if not future.done():
                future.set_result({"kind": "LaunchError", "error": error})

    def _epitaph(self) -> str:
        code = self.process.poll()
        how = (
            "is closed"
            if code is None
            else f"was killed by signal {-code}"
            if code < 0
            else f"exited with code {code}"
        )
        lines = last_lines(self.stderr_path)
        raised = re.findall(r"(?m)^[\w.]+: .+$", lines)  # comes first: a state in Prefect shows one line
        return f"the launcher process {how}{f' ({raised[-1]})' if raised else ''}; run again to resume" + (
            f". Its last words:\n{lines}" if lines else ""
        )

    def close(self) -> None:
        """End the process: by closing its pipe, then less kindly."""
        with contextlib.suppress(LaunchError):
            self.write({"op": "end"})  # a fork of this process may hold the pipe open
        with contextlib.suppress(OSError):  # a dead process leaves a broken pipe
            cast(BinaryIO, self.process.stdin).close()
        try:
            self.process.wait(self.grace_seconds + 10.0)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)  # takes the fork server and the ranks with it
            self.process.wait()
        self._reader.join()
        shutil.rmtree(self.folder, ignore_errors=True)


def _checked(reply: _Reply) -> _Reply:
    if "error" in reply:
        raise (ConfigError if reply["kind"] == "ConfigError" else LaunchError)(reply["error"])
    return reply


def _short_temporary_folder() -> str | None:
    """Return a socket's path has room for 107 characters, of which ours takes 60."""
    return "/tmp" if len(tempfile.gettempdir()) > 40 else None
