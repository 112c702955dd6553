"""What each rank runs, under the launcher or under `torchrun -m danling_core.worker CONFIG`."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from danling_core import distributed, storage
from danling_core.config import Config
from danling_core.context import RunContext, use
from danling_core.control import Control
from danling_core.errors import ConfigError, DanLingError, RunInterrupted
from danling_core.identity import check_code, identify
from danling_core.prepare import load_runner, pin, prepare
from danling_core.run_folder import Status
from danling_core.runner.torch_runner import TorchRunner
from danling_core.runner.writing import text_log_path

__all__ = ["execute", "main", "prepare", "run_rank"]

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 75


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
        source_file=request["source_file"],
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
    cls, control = load_runner(config)[1], context.control
    if context.source_file is not None and distributed.rank() == 0:
        check_code(config, context.source_file)
    with _stop_on_sigterm(control), use(context):
        runner = cls(config)
        try:
            status = runner.run(stages)
        except RunInterrupted:
            _leave(runner, control)
            raise
        _leave(runner, control)
        return status


def _leave(runner: TorchRunner, control: Control | None) -> None:
    """Leave the other ranks, all at the same point; said first, since gloo may abort or lock up there."""
    if control is not None:
        control.ranks[runner.local_rank].finish()
    distributed.destroy_process_group()


@contextlib.contextmanager
def _stop_on_sigterm(control: Control | None) -> Iterator[None]:
    """SIGTERM asks all ranks of this node to save and stop; the handler is put back after."""
    if control is None:
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: control.request_stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Train one run in the process group that torchrun made, without Prefect; returns the exit code.

    0 done, 2 bad input, 75 interrupted and resumable; a failure raises, and torchrun ends the other ranks.
    """
    arguments = _parser().parse_intermixed_args(argv)
    faulthandler.enable()
    sys.path.insert(0, os.getcwd())
    try:
        config, _, source = pin(Config.load(arguments.config, arguments.overrides))
    except ConfigError as error:
        return _refuse(error, EXIT_BAD_INPUT)
    distributed.init_process_group(distributed.resolve_device(config.device), config.hang_timeout_seconds)
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
    control_path = answer.pop("control_path")
    return RunContext(**answer, control=None if control_path is None else Control.open(control_path))


def _open(config: Config, source: str | None, fresh: bool, stack: contextlib.ExitStack) -> Any:
    from danling_core.open_run import open_run

    opened = open_run(config, identify(config, source), fresh=fresh, source_file=source)
    if opened.lease is None:
        return opened.folder.url
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    control_path = None
    if local_world == distributed.world_size():  # shared memory reaches no other node
        folder = tempfile.mkdtemp(prefix="danling-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        control_path = os.path.join(folder, "control")
        Control.create(control_path, local_world).close()
    stack.callback(opened.lease.release)
    stack.enter_context(opened.lease.beating())
    return {
        "work_dir": opened.work_dir,
        "url": opened.folder.url,
        "generation": opened.generation,
        "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        "control_path": control_path,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node N -m danling_core.worker",
        description="Train one run under torchrun, without Prefect, to the same bits as `danling run`.",
        epilog="example: torchrun --nproc-per-node 2 -m danling_core.worker run.yaml seed=1 optim.lr=1e-3",
    )
    parser.add_argument(
        "config", help="YAML or JSON file of the run; the config.yaml of a run's folder will do"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides: params.lr=0.003")
    parser.add_argument("--fresh", action="store_true", help="begin anew, under a new timestamp")
    return parser


if __name__ == "__main__":
    sys.exit(main())
