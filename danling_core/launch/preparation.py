"""Preparation of configs in a fresh process, the only one that imports the user's code for it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any

from danling_core.errors import ConfigError
from danling_core.launch import child
from danling_core.launch.verdict import signal_name
from danling_core.process_tree import kill_tree, start_time
from danling_core.writers.follow import last_lines

_END_SECONDS = 5.0  # for a process whose pipe is closed already, before it is killed


class Preparation:
    """One process that prepares some configs. `run` in the launcher's main thread; `kill` from any."""

    def __init__(
        self, entrypoint: str, configs: Sequence[dict[str, Any]], env: Mapping[str, str], cwd: str
    ) -> None:
        self._order = {
            "entrypoint": entrypoint,
            "configs": list(configs),
            "env": dict(env),
            "cwd": cwd,
            "launcher_pid": os.getpid(),
            "launcher_started": start_time(os.getpid()),
        }
        self._count = len(configs)
        self._runners = ", ".join(dict.fromkeys(repr(config.get("runner")) for config in configs))
        self._pid: int | None = None
        self._started: int | None = None

    def run(self, timeout_seconds: float, stderr_path: str) -> list[Any]:
        """Return the prepare function's result for each config.

        Raises:
            ConfigError: for a config that cannot be run: the function says so, or the runner cannot be
            imported.
        """
        context = multiprocessing.get_context("forkserver")
        receiver, sender = context.Pipe(duplex=False)
        printed = os.path.getsize(stderr_path) if os.path.exists(stderr_path) else 0
        process = context.Process(target=child.enter_preparation, args=(self._order, sender))
        process.start()
        sender.close()
        pid = process.pid or 0
        self._pid, self._started = pid, start_time(pid)
        try:
            is_timed_out = not wait([receiver, process.sentinel], timeout_seconds)
            answers = receiver.recv() if receiver.poll() else None
        except EOFError:
            answers = None
            process.join(_END_SECONDS)
        finally:
            self.kill()
            process.join()
            receiver.close()
        if answers is None:
            raise ConfigError(
                self._what_happened(process.exitcode, is_timed_out, timeout_seconds, stderr_path, printed)
            )
        return _unpack(answers)

    def kill(self) -> None:
        """End the process, if it runs."""
        if self._pid is not None:
            kill_tree(self._pid, self._started)

    def _what_happened(
        self,
        exit_code: int | None,
        is_timed_out: bool,
        timeout_seconds: float,
        stderr_path: str,
        printed: int,
    ) -> str:
        what = f"cannot import runner {self._runners}: "
        if is_timed_out:
            return (
                f"{what}no end after {timeout_seconds:g} s for {self._count} config(s); move long work from the module "
                "into the runner, or, if git is slow in that repository, state experiment_id"
            )
        code = exit_code or 0
        how = signal_name(-code) if code < 0 else f"exit code {code}"
        lines = last_lines(stderr_path, printed)
        return f"{what}the importing process died by {how}" + (f":\n{lines}" if lines else "")


def _unpack(answers: Sequence[Mapping[str, Any]]) -> list[Any]:
    for answer in answers:
        if "error" in answer:
            raise ConfigError(answer["error"])
    return [answer["prepared"] for answer in answers]
