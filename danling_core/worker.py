"""What each rank runs, under the launcher or under `torchrun -m danling_core.worker CONFIG`."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from danling_core import storage
from danling_core.config import Config
from danling_core.errors import ConfigError, DanLingError, RunInterrupted
from danling_core.identity.ids import identify
from danling_core.identity.sources import check_sources
from danling_core.launch.prepare import load_runner, pin, prepare
from danling_core.parallel import distributed
from danling_core.parallel.control import Control
from danling_core.parallel.stopping import share
from danling_core.runner.torch_runner import TorchRunner
from danling_core.runs.folder import Status
from danling_core.session.context import RunContext, use
from danling_core.session.rank_failures import RankFailures
from danling_core.session.writers import text_log_path
from danling_core.writers import TextLog

__all__ = ["execute", "main", "prepare", "run_rank"]

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 75

_EPILOG = """\
example: torchrun --nproc-per-node 2 -m danling_core.worker run.yaml seed=1 optim.lr=1e-3

SIGTERM, Ctrl-C and max_seconds save the run, and its ranks exit with 75: the same command resumes it. torchrun
knows no such ending: it prints a banner of a failure and exits with 1 itself, kills ranks that are still saving
30 s after a signal (on several nodes ranks stop at every 16th step only, so 16 steps have to fit, too), and with
--max-restarts it starts a run again that stopped of its own accord. What happened is in the last line of the run's
log. A second Ctrl-C gives that save up; one that is under way already, and its delivery to a store, are waited for.
"""


def run_rank(request: Mapping[str, Any], control_path: str, restart: int) -> None:
    """Be one rank of a run, as the launcher asks. Collective.

    How it ended is in the event log and the status: an interruption ends normally, an exception is for the
    launcher, which tells the driver.
    """
    _take_output(request["work_dir"], request["config"])
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
        execute(Config.load(request["config"]), context, request["stages"], request["threads_per_rank"])


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


def execute(config: Config, context: RunContext, stages: Sequence[str], threads: int) -> Status | None:
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
            cls = load_runner(config)[1]
            if distributed.rank() == 0:
                check_sources(context.sources)
            runner = cls(config)
            try:
                status = runner.run(stages)
            except RunInterrupted as error:
                interruption = error
        # How the run ended is told by now: what goes wrong here changes nothing.
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
    from danling_core.launch.messages import Outcome, RunRequest

    fields = {name: failure[name] for name in ("error", "traceback", "rank", "step")}
    with TextLog(text_log_path(config.log_path, context.work_dir) if config.log else None) as log:
        log.on_event({"event": "failed", **fields})
    request = RunRequest(
        config=config.dict(),
        work_dir=context.work_dir,
        remote_url=None if storage.is_local(context.url) else context.url,
        generation=context.generation,
        nproc=distributed.world_size(),
    )
    recorded = record(request, context.attempt, Outcome("failed", **fields), dict(os.environ))
    if recorded.error != failure["error"]:
        _tell(str(recorded.error))


def _leave(runner: TorchRunner, control: Control | None) -> None:
    """Leave the other ranks, all at the same point; said first, since gloo may abort or lock up there."""
    if control is not None:
        faulthandler.disable()  # for the same reason: that abort is no news for the log
        control.ranks[runner.local_rank].finish()
    distributed.destroy_process_group()


@contextlib.contextmanager
def _stopping_on_signals(context: RunContext) -> Iterator[None]:
    """SIGTERM, and under torchrun the first Ctrl-C, ask all ranks to save and stop; handlers are put back after."""
    control = context.control
    if control is None:
        yield
        return

    def ask(number: int, frame: object) -> None:
        control.request_stop()
        if number == signal.SIGINT:  # a second one ends this rank at once
            signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = [signal.SIGTERM] if context.is_launched else [signal.SIGTERM, signal.SIGINT]
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Train one run in the process group that torchrun made, without Prefect; returns the exit code.

    0 done, 2 bad input, 75 interrupted and resumable; a failure raises, and torchrun ends the other ranks.
    """
    arguments = _parser().parse_intermixed_args(argv)
    faulthandler.enable()
    sys.path.insert(0, os.getcwd())
    try:
        config, _, source = pin(Config.load(arguments.config, arguments.overrides))
        device = distributed.resolve_device(config.device)
    except ConfigError as error:
        return _refuse(error, EXIT_BAD_INPUT)
    distributed.init_process_group(device, config.hang_timeout_seconds)
    with contextlib.ExitStack() as stack:
        context = _open_together(config, source, arguments.fresh, stack)
        if isinstance(context, DanLingError):
            return _refuse(context, EXIT_BAD_INPUT if isinstance(context, ConfigError) else EXIT_FAILED)
        if isinstance(context, str):
            _tell(f"{context} is complete; --fresh trains it again")
            distributed.destroy_process_group()
            return 0
        try:
            execute(config, context, config.stages, config.threads_per_rank)
        except RunInterrupted as error:
            return _refuse(error, EXIT_INTERRUPTED)
    return 0


def _refuse(error: DanLingError, code: int) -> int:
    _tell(str(error))
    return code


def _tell(message: str) -> None:
    if distributed.rank() == 0:
        print(f"danling: {message}", file=sys.stderr)


def _open_together(
    config: Config, source: str | None, fresh: bool, stack: contextlib.ExitStack
) -> RunContext | DanLingError | str:
    """Rank 0 finds or creates the run, and holds its lease until `stack` ends; all are told. Collective.

    Returns the context, the folder's URL where the run is complete, or the error, on every rank the same.
    """
    answer: Any = None
    if distributed.rank() == 0:
        try:
            answer = _open(config, source, fresh, stack)
        except DanLingError as error:
            answer = error
    answer = distributed.broadcast_object(answer)
    if not isinstance(answer, dict):
        return answer
    shared = share()
    if shared.is_owner:
        stack.callback(shutil.rmtree, shared.folder, ignore_errors=True)
    failures = RankFailures(shared.folder, distributed.rank())
    return RunContext(**answer, control=shared.control, nodes=shared.nodes, failures=failures)


def _open(config: Config, source: str | None, fresh: bool, stack: contextlib.ExitStack) -> Any:
    from danling_core.session.open_run import open_run

    storage.configure(config.storage_options)  # of this process, and so of the thread that beats
    opened = open_run(config, identify(config, source), fresh=fresh, source_file=source)
    if opened.lease is None:
        return opened.folder.url
    stack.callback(opened.lease.release)
    stack.enter_context(opened.lease.beating())
    return {
        "work_dir": opened.work_dir,
        "url": opened.folder.url,
        "generation": opened.generation,
        "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node N -m danling_core.worker",
        description="Train one run under torchrun, without Prefect, to the same bits as `danling run`.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config", help="YAML or JSON file of the run; the config.yaml of a run's folder will do"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides: params.lr=0.003")
    parser.add_argument("--fresh", action="store_true", help="begin anew, under a new timestamp")
    return parser


if __name__ == "__main__":
    sys.exit(main())
