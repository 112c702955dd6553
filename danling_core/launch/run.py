"""One run, from its first launch to its outcome: relaunches after deaths and hangs, and the wish to stop."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from danling_core.errors import LaunchError
from danling_core.launch.group import run_group
from danling_core.launch.messages import Outcome, RunRequest
from danling_core.launch.verdict import Verdict, judge
from danling_core.launch.watch import Watch
from danling_core.parallel.control import Control
from danling_core.process_tree import start_time
from danling_core.writers import TERMINAL, EventLog
from danling_core.writers.follow import end_of_lines, follow

logger = logging.getLogger(__name__)

_DEFAULTS = {"PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false"}


class SupervisedRun:
    """Runs `request` in the launcher's main thread; `interrupt` may come from another.

    Args:
        request: what to run.
        env: the driver's environment at the time of the request.
        cwd: the driver's working folder at that time.
        entrypoint: of each rank, as "module:function", called with (request, control path, restart).
        folder: private to the launcher; each launch gets a folder of its own inside, which is removed.
    """

    def __init__(
        self, request: RunRequest, env: Mapping[str, str], cwd: str, entrypoint: str, folder: str
    ) -> None:
        self.request = request
        self._env = {"OMP_NUM_THREADS": str(request.threads_per_rank), **env, **_DEFAULTS}
        self._cwd = cwd
        self._entrypoint = entrypoint
        self._folder = folder
        self._lock = threading.Lock()
        self._watch: Watch | None = None
        self._stop_reason: str | None = None
        self._is_kill_wanted = False

    def interrupt(self, reason: str, kill: bool = False) -> None:
        """Ask the ranks to save and stop; kill them after the grace, or at once with `kill`. Any thread."""
        with self._lock:
            self._stop_reason = self._stop_reason or reason
            self._is_kill_wanted = self._is_kill_wanted or kill
            if self._watch is not None:
                self._pass_on(self._watch)

    def _pass_on(self, watch: Watch) -> None:
        watch.request_stop(time.monotonic())
        if self._is_kill_wanted:
            watch.kill_from_now_on()

    def run(self) -> Outcome:
        """Launch until the run has an outcome, and leave its terminal event in the run's folder."""
        with _locked(self.request.work_dir, self.request.stop_grace_seconds + 15):
            offset = end_of_lines(self.request.events_path)
            previous: Verdict | None = None
            for restart in range(self.request.max_restarts + 1):
                if self._stop_reason is not None:
                    return self._interrupted(restart, previous)
                verdict = self._launch(restart)
                terminal = self._terminal(offset, restart)
                if terminal is not None and self._is_true(terminal, verdict):
                    return _from_event(terminal, restart)
                if self._stop_reason is not None and verdict.kind != "raised":
                    return self._interrupted(restart, verdict)
                reason = self._why_final(verdict, previous, restart)
                if reason is not None:
                    return self._failed(replace(verdict, message=reason), restart)
                self._tell_restart(verdict, restart)
                previous = verdict
            raise AssertionError("the last launch is final")

    def _is_true(self, terminal: Mapping[str, Any], verdict: Verdict) -> bool:
        """Return whether the ranks' last word stands, whatever their exit codes: many abort in their teardown.

        Not where one rank failed first, and elastic's SIGTERM made another take its leave.
        """
        if terminal["event"] == "completed":
            return True
        if terminal["event"] == "interrupted":
            return verdict.kind == "none" or self._stop_reason is not None
        return not verdict.is_restartable

    def _why_final(self, verdict: Verdict, previous: Verdict | None, restart: int) -> str | None:
        """Return the message of the failure, if no relaunch follows; None if one does."""
        if not verdict.is_restartable:
            return verdict.message
        if previous is not None and verdict.step is not None and verdict.step == previous.step:
            return f"step {verdict.step} failed twice in a row and is taken for poisoned: {verdict.message}"
        if restart == self.request.max_restarts:
            return (
                f"{verdict.message} (after {restart} restarts: max_restarts is {self.request.max_restarts})"
            )
        return None

    def _launch(self, restart: int) -> Verdict:
        request = self.request
        with (
            tempfile.TemporaryDirectory(prefix="launch-", dir=self._folder) as folder,
            Control.create(os.path.join(folder, "control"), request.nproc) as control,
        ):
            watch = Watch(control, request.hang_timeout_seconds, request.stop_grace_seconds)
            with self._lock:
                self._watch = watch
                if self._stop_reason is not None:
                    self._pass_on(watch)
            thread = watch.start()
            try:
                return judge(run_group(self._order(control, restart), request.nproc, folder, watch))
            finally:
                with self._lock:
                    self._watch = None
                watch.stop()
                thread.join()

    def _order(self, control: Control, restart: int) -> dict[str, Any]:
        return {
            "request": self.request.to_dict(),
            "env": self._env,
            "cwd": self._cwd,
            "entrypoint": self._entrypoint,
            "control_path": control.path,
            "restart": restart,
            "launcher_pid": os.getpid(),
            "launcher_started": start_time(os.getpid()),
        }

    def _terminal(self, offset: int, restart: int) -> dict[str, Any] | None:
        attempt, found = self._attempt(restart), None
        for event in follow(self.request.events_path, from_offset=offset, stop=lambda: True):
            if event.get("attempt") == attempt and event.get("event") in TERMINAL:
                found = event
        return found

    def _attempt(self, restart: int) -> str:
        return f"{self.request.generation}.{restart}"

    def _failed(self, verdict: Verdict, restart: int) -> Outcome:
        outcome = Outcome(
            "failed",
            verdict.message,
            verdict.traceback,
            verdict.rank,
            verdict.step,
            restart,
            verdict.is_bad_input,
        )
        return self._record(outcome, restart)

    def _interrupted(self, restart: int, verdict: Verdict | None) -> Outcome:
        """Return the ranks have not said so themselves: none was running, or they were killed while stopping."""
        reason = f"{self._stop_reason}; what was last committed is kept"
        step = None if verdict is None else verdict.step
        outcome = Outcome("interrupted", reason, step=step, restarts=restart)
        return self._record(outcome, restart)

    def _record(self, outcome: Outcome, restart: int) -> Outcome:
        from danling_core.launch.ending import record  # brings the storage, which most launchers never need

        return record(self.request, self._attempt(restart), outcome, self._env)

    def _tell_restart(self, verdict: Verdict, restart: int) -> None:
        log = EventLog(self.request.events_path, self._attempt(restart))
        try:
            log.emit(
                "restarting",
                error=verdict.message,
                rank=verdict.rank,
                step=verdict.step,
                restart=restart + 1,
            )
        finally:
            log.close()


def _from_event(event: Mapping[str, Any], restarts: int) -> Outcome:
    if event["event"] == "completed":
        return Outcome("complete", restarts=restarts)
    if event["event"] == "interrupted":
        return Outcome("interrupted", event.get("reason"), step=event.get("step"), restarts=restarts)
    error, traceback, rank, step = (event.get(name) for name in ("error", "traceback", "rank", "step"))
    return Outcome("failed", error, traceback, rank, step, restarts)


@contextmanager
def _locked(folder: str, wait_seconds: float) -> Iterator[None]:
    """Hold the folder, so that ranks that are still stopping for a driver that died are waited for.

    Raises:
        LaunchError: where they are still there after `wait_seconds`, or the folder is not.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise LaunchError(f"the run's local folder cannot be opened: {error}") from error
    try:
        deadline = time.monotonic() + wait_seconds
        while not _try_lock(fd):
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"another launcher still runs ranks in {folder}; stop it, or wait for its end"
                )
            time.sleep(0.1)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("this file system does not lock folders (%s): going on without", error)
    return True
