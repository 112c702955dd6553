"""One rank of a run, from its process's first line to its leaving: the same under the launcher and under torchrun."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pdb
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from danling_core import storage
from danling_core.config import Config
from danling_core.errors import ConfigError, RunInterrupted
from danling_core.identity.sources import check_sources
from danling_core.parallel import distributed
from danling_core.parallel.control import Control
from danling_core.process_tree import STOP_SIGNALS
from danling_core.runner.resolve import import_runner
from danling_core.runner.torch_runner import TorchRunner
from danling_core.runs.folder import Status
from danling_core.session.context import RunContext, use
from danling_core.session.writers import text_log_path
from danling_core.writers import TextLog
from danling_core.writers.console import survive_a_closed_console


def run_launched(request: Mapping[str, Any], control_path: str, restart: int) -> None:
    """Be one rank of a run, as the launcher asks. Collective.

    How it ended is in the event log and the status: an interruption ends normally, an exception is for the
    launcher, which tells the driver.
    """
    _take_output(request["work_dir"], request["config"])
    sys.breakpointhook = pdb.set_trace = _no_terminal
    context = RunContext(
        work_dir=request["work_dir"],
        url=request.get("remote_url") or request["work_dir"],
        generation=request["generation"],
        restart=restart,
        control=Control.open(control_path),
        is_launched=True,
        sources=request["sources"],
    )
    with contextlib.suppress(RunInterrupted):
        run_stages(Config.load(request["config"]), context, request["stages"], request["threads_per_rank"])


def _no_terminal(*values: Any, **named: Any) -> None:
    """Refuse to stop for a debugger. Raises ConfigError."""
    caller = sys._getframe(1)
    raise ConfigError(
        f"breakpoint in {caller.f_code.co_filename}:{caller.f_lineno}: launched ranks have no terminal; "
        "`danling run CONFIG --here` trains on one rank in yours"
    )


def _take_output(work_dir: str, config: Mapping[str, Any]) -> None:
    """Send what this rank prints to a file, so that it needs no pipe that somebody may stop reading."""
    rank = distributed.rank()
    path = text_log_path(config["log_path"], work_dir)
    if not config["log"]:
        path = os.devnull
    elif rank:
        path = os.path.join(work_dir, "logs", f"rank-{rank}.log")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)
    survive_a_closed_console()


def run_stages(config: Config, context: RunContext, stages: Sequence[str], threads: int) -> Status | None:
    """Build the runner and run its stages; leave nothing open. Collective. Returns the status on rank 0.

    Raises:
        RunInterrupted: saved, and can be resumed.
    """
    torch.set_num_threads(threads)
    storage.configure(config.storage_options)
    # The signals outermost: torchrun sends SIGTERM to a rank that is recording what another one failed of.
    with _stopping_on_signals(context), use(context):
        status, interruption = None, None
        with _recording_failures(config, context):
            cls = import_runner(config.runner or "")  # its config was checked when the run was prepared
            if distributed.rank() == 0:
                check_sources(context.sources)
            runner = cls(config)
            try:
                status = runner.run(stages)
            except RunInterrupted as error:
                interruption = error
        # The end of the run is recorded by now: an error here changes nothing.
        _leave(runner, context.control)
        if interruption is not None:
            raise interruption
        return status


@contextlib.contextmanager
def _recording_failures(config: Config, context: RunContext) -> Iterator[None]:
    """Under torchrun, leave a failure in the run's folder that no runner could: it was not built, or not at work."""
    try:
        yield
    except RunInterrupted:
        raise
    except (Exception, SystemExit) as error:
        if context.failures is not None and not context.failures.is_settled:
            failure = context.failures.settle(error, None)
            if distributed.rank() == 0:
                _record(config, context, failure)
        raise


def _record(config: Config, context: RunContext, failure: Mapping[str, Any]) -> None:
    from danling_core.launch.ending import record
    from danling_core.launch.messages import Outcome
    from danling_core.launch.plan import request_of

    fields = {name: failure[name] for name in ("error", "traceback", "rank", "step")}
    with TextLog(text_log_path(config.log_path, context.work_dir) if config.log else None) as log:
        log.on_event({"event": "failed", **fields})
    request = request_of(
        config,
        context.work_dir,
        remote_url=None if storage.is_local(context.url) else context.url,
        generation=context.generation,
        nproc=distributed.world_size(),
    )
    recorded = record(request, context.attempt, Outcome("failed", **fields), dict(os.environ))
    if recorded.error != failure["error"]:
        print_once(str(recorded.error))


def _leave(runner: TorchRunner, control: Control | None) -> None:
    """Leave the other ranks, all at the same point; said first, since gloo may abort or lock up there."""
    if control is not None:
        faulthandler.disable()  # for the same reason: that abort is no news for the log
        control.ranks[runner.local_rank].finish()
    distributed.destroy_process_group()


@contextlib.contextmanager
def _stopping_on_signals(context: RunContext) -> Iterator[None]:
    """Have each signal that means so, and under torchrun the first Ctrl-C, ask all ranks to save and stop; put handlers
    back after."""
    control = context.control
    if control is None:
        yield
        return

    def ask(number: int, frame: object) -> None:
        control.request_stop()
        if number == signal.SIGINT:  # a second one ends this rank at once
            signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = STOP_SIGNALS if context.is_launched else (*STOP_SIGNALS, signal.SIGINT)
    ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]  # by nohup
    before = {number: signal.signal(number, ask) for number in numbers if number not in ignored}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_once(message: str) -> None:
    """Print a line on stderr, for the person at the terminal. Rank 0; others return."""
    if distributed.rank() == 0:
        print(f"danling: {message}", file=sys.stderr)
