"""The launcher process: takes requests from its driver, one at a time, and outlives no driver."""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import multiprocessing
import os
import queue
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from typing import TYPE_CHECKING, Any

from danling_core.errors import ConfigError, LaunchError
from danling_core.launch.messages import RunRequest
from danling_core.launch.preparation import Preparation
from danling_core.process_tree import DUMP_STACKS, ignore_stop_signals

if TYPE_CHECKING:
    from danling_core.launch.run import SupervisedRun

logger = logging.getLogger(__name__)

_PRELOAD = ["danling_core.launch.fork_server", "torch", "torch._dynamo", "danling_core.launch.child"]
_LAST_RESORT_SECONDS = 20.0  # beyond the grace, for a launcher that cannot end in order


class Server:
    """Serves requests in the main thread, as elastic and PR_SET_PDEATHSIG want it; a second thread listens.

    Args:
        requests_fd: where JSON lines come from; its end means that the driver is gone.
        replies_fd: where replies go.
        folder: private, with the launcher's stderr in it.
        rank_entrypoint, prepare_entrypoint: "module:function".
    """

    def __init__(
        self, requests_fd: int, replies_fd: int, folder: str, rank_entrypoint: str, prepare_entrypoint: str
    ) -> None:
        self._requests_fd = requests_fd
        self._replies_fd = replies_fd
        self._folder = folder
        self._rank_entrypoint = rank_entrypoint
        self._prepare_entrypoint = prepare_entrypoint
        self._driver_pid = os.getppid()
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._lock = threading.Lock()  # over the next five
        self._run: SupervisedRun | None = None
        self._run_id: int | None = None
        self._stops: dict[int, tuple[str, bool]] = {}  # asked for before the run's turn has come
        self._preparation: Preparation | None = None
        self._gone_reason: str | None = None
        self._wake_fd, self._signal_fd = os.pipe()

    def serve(self) -> None:
        """Warm up, then serve until the driver is gone."""
        ignore_stop_signals()  # the driver gets them, too, and asks for what they mean
        signal.signal(signal.SIGTERM, lambda *_: os.write(self._signal_fd, b"t"))
        # for a person with a launcher that hangs
        faulthandler.register(DUMP_STACKS, file=2, all_threads=True)
        threading.Thread(target=self._listen, name="danling-listen", daemon=True).start()
        self._warm_up()
        while (message := self._queue.get()) is not None:
            self._reply({"id": message["id"], **self._answer(message)})

    def _warm_up(self) -> None:
        """Start the fork server and load elastic meanwhile; both take about 2 s."""
        multiprocessing.set_forkserver_preload([*_PRELOAD, self._rank_entrypoint.partition(":")[0]])
        forkserver.ensure_running()  # starting a process would wait for the end of its preload
        from danling_core.launch import group, run  # noqa: F401

        group.quieten()
        _await_fork_server()

    def _answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        try:
            if message["op"] == "prepare":
                return {"prepared": self._prepare(message)}
            if message["op"] == "run":
                return {"outcome": self._supervise(message)}
            raise LaunchError(f"unknown request {message['op']!r}")
        except (ConfigError, LaunchError) as error:
            return {"kind": type(error).__name__, "error": str(error)}
        except Exception:  # the driver raises it; the next request may do better
            return {"kind": "LaunchError", "error": f"the launcher failed:\n{traceback.format_exc()}"}

    def _prepare(self, message: Mapping[str, Any]) -> list[Any]:
        preparation = Preparation(
            self._prepare_entrypoint, message["configs"], message["env"], message["cwd"]
        )
        with self._lock:
            self._check_driver()
            self._preparation = preparation
        try:
            return preparation.run(message["timeout_seconds"], os.path.join(self._folder, "stderr.log"))
        finally:
            with self._lock:
                self._preparation = None

    def _supervise(self, message: Mapping[str, Any]) -> dict[str, Any]:
        from danling_core.launch.run import SupervisedRun

        request = RunRequest.from_dict(message["request"])
        run = SupervisedRun(request, message["env"], message["cwd"], self._rank_entrypoint, self._folder)
        with self._lock:
            self._check_driver()
            self._run, self._run_id = run, message["id"]
            if message["id"] in self._stops:
                run.interrupt(*self._stops.pop(message["id"]))
        try:
            return run.run().to_dict()
        finally:
            with self._lock:
                self._run = self._run_id = None

    def _check_driver(self) -> None:
        if self._gone_reason is not None:
            raise LaunchError(self._gone_reason)

    def _reply(self, message: dict[str, Any]) -> None:
        line = memoryview(json.dumps(message).encode() + b"\n")
        try:
            while line:
                line = line[os.write(self._replies_fd, line) :]
        except BrokenPipeError:
            self._end("the driver is gone")

    # The listening thread.

    def _listen(self) -> None:
        buffer = b""
        while True:
            ready, _, _ = select.select([self._requests_fd, self._wake_fd], [], [], 1.0)
            if self._wake_fd in ready:
                return self._end("the launcher got SIGTERM")
            if os.getppid() != self._driver_pid:  # a stray copy of the pipe may hide its end
                return self._end("the driver is gone")
            if self._requests_fd in ready:
                data = os.read(self._requests_fd, 1 << 16)
                if not data:
                    return self._end("the driver is gone")
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    self._take(json.loads(line))

    def _take(self, message: dict[str, Any]) -> None:
        if message["op"] == "end":
            return self._end("the driver is gone")
        if message["op"] != "interrupt":
            return self._queue.put(message)
        with self._lock:
            if self._run is not None and self._run_id == message["id"]:
                self._run.interrupt(message["reason"], message["kill"])
            else:
                self._stops[message["id"]] = message["reason"], message["kill"]

    def _end(self, reason: str) -> None:
        """Stop what runs, then the process."""
        with self._lock:
            if self._gone_reason is not None:
                return
            self._gone_reason = reason
            run, preparation = self._run, self._preparation
        if preparation is not None:
            preparation.kill()
        if run is not None:
            run.interrupt(reason)
        self._queue.put(None)
        grace = 0.0 if run is None else run.request.stop_grace_seconds
        threading.Thread(target=self._last_resort, args=(grace + _LAST_RESORT_SECONDS,), daemon=True).start()

    def _last_resort(self, seconds: float) -> None:
        time.sleep(seconds)
        os._exit(1)  # takes the fork server and the ranks with it


def _await_fork_server() -> None:
    """Return when the fork server is warm; start another for one that died meanwhile."""
    for tries_left in (2, 1, 0):
        process = multiprocessing.get_context("forkserver").Process(target=os.getpid)
        try:
            process.start()
            return process.join()
        except (OSError, EOFError) as error:
            logger.warning("the fork server died while it warmed up (%s): %d tries left", error, tries_left)
            if not tries_left:
                raise


def main(argv: Sequence[str]) -> int:
    """Serve the driver on stdin and stdout until it is gone."""
    parser = argparse.ArgumentParser(prog="danling_core.launch")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--rank-entrypoint", required=True)
    parser.add_argument("--prepare-entrypoint", required=True)
    options = parser.parse_args(argv)
    tempfile.tempdir = options.folder  # so that what is left by processes that were killed goes with it
    requests_fd, replies_fd = _take_over_stdio()
    server = Server(
        requests_fd, replies_fd, options.folder, options.rank_entrypoint, options.prepare_entrypoint
    )
    server.serve()
    shutil.rmtree(options.folder, ignore_errors=True)  # not after an error: the driver reads our last words
    return 0


def _take_over_stdio() -> tuple[int, int]:
    """Move the two pipes to private fds: stray prints go to stderr, and no child inherits the pipes."""
    sys.stdout.flush()
    requests_fd, replies_fd = os.dup(0), os.dup(1)  # dup'ed fds are not inherited
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return requests_fd, replies_fd
