"""What each rank runs: under the launcher, or under plain `torchrun -m danling_core.worker CONFIG [key=value ...]`."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from danling_core import distributed
from danling_core.config import Config
from danling_core.context import RunContext, use
from danling_core.control import Control, Phase
from danling_core.errors import ConfigError, RunInterrupted
from danling_core.identity import experiment_id_of, identify
from danling_core.optim import check_scheduler, optimizer_class
from danling_core.run_folder import Status
from danling_core.runner.resolve import import_runner, resolve
from danling_core.runner.torch_runner import TorchRunner

EXIT_INTERRUPTED = 75


# for the launcher ------------------------------------------------------------------------------------------------------
def prepare(config: Mapping[str, Any], cwd: str) -> dict[str, Any]:
    """Everything about a run that only its code can tell: the full config, the experiment id, the world.

    Called in a process of its own, since it runs the user's module. Nothing is created.

    Raises:
        ConfigError: anything about config, params or the named classes that would not work.
    """
    resolved, cls = _resolve(Config.load(config))
    source = getattr(sys.modules.get(cls.__module__), "__file__", None)
    experiment_id = resolved.experiment_id or experiment_id_of(source, _stores(resolved, cwd))
    return {
        "config": resolved.model_copy(update={"experiment_id": experiment_id}).dict(),
        "experiment_id": experiment_id,
        "source_file": source,
        "world_size": ranks_per_node(resolved) * resolved.nnodes,
        "device": _device_type(resolved),
    }


def _resolve(config: Config) -> tuple[Config, type[TorchRunner]]:
    if config.runner is None:
        raise ConfigError(
            "runner is missing: name your class as 'package.module:Class' or 'path/to/file.py:Class'"
        )
    cls = import_runner(config.runner)
    if not issubclass(cls, TorchRunner):
        raise ConfigError(
            f"runner {config.runner!r} is a {cls.__mro__[1].__name__}, not a danling_core.TorchRunner"
        )
    if config.optim is not None:
        optimizer_class(config.optim.name, config.optim.arguments())
    if config.scheduler is not None:
        check_scheduler(config.scheduler.name, config.scheduler.arguments())
    return resolve(cls, config)[0], cls


def _stores(config: Config, cwd: str) -> list[str]:
    """Local folders that hold runs, and so are no code."""
    places = (config.project_root, config.dir, config.checkpoint_dir, config.log_path, config.scratch)
    return [os.path.join(cwd, place) for place in places if place is not None and "://" not in place]


def ranks_per_node(config: Config) -> int:
    """`nproc_per_node`, where `auto` means the GPUs that will be used, else 1."""
    if config.nproc_per_node != "auto":
        return int(config.nproc_per_node)
    return max(torch.cuda.device_count(), 1) if _device_type(config) == "cuda" else 1


def _device_type(config: Config) -> str:
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def run_rank(request: Mapping[str, Any], control_path: str, restart: int) -> None:
    """Be one rank of a run, as the launcher asks. Collective. How it ended is in the event log and the status.

    An interruption ends normally; an exception is for the launcher, which tells the driver.
    """
    _take_output(request["work_dir"])
    control = Control.open(control_path)
    context = RunContext(
        work_dir=request["work_dir"],
        url=request.get("remote_url") or request["work_dir"],
        generation=request["generation"],
        restart=restart,
        control=control,
        is_launched=True,
    )
    config = Config.load(request["config"])
    with contextlib.suppress(RunInterrupted):
        execute(config, context, request["stages"], request["threads_per_rank"])


def _take_output(work_dir: str) -> None:
    """Send what this rank prints to a file, so that it needs no pipe that somebody may stop reading."""
    rank = distributed.rank()
    path = os.path.join(work_dir, "run.log")
    if rank:
        os.makedirs(os.path.join(work_dir, "logs"), exist_ok=True)
        path = os.path.join(work_dir, "logs", f"rank-{rank}.log")
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)


# for both --------------------------------------------------------------------------------------------------------------
def execute(config: Config, context: RunContext, stages: Sequence[str], threads: int) -> Status | None:
    """Build the runner and run its stages; leave nothing open. Collective. Returns the status on rank 0.

    Raises:
        RunInterrupted: saved, and can be resumed.
    """
    torch.set_num_threads(threads)
    cls = _resolve(config)[1]
    control = context.control
    with _stop_on_sigterm(control), use(context):
        runner = cls(config)
        if control is not None:
            control.ranks[runner.local_rank].enter_phase(Phase.TRAINING)
        try:
            status = runner.run(stages)
        except RunInterrupted:
            distributed.destroy_process_group()
            raise
        if control is not None:
            control.ranks[runner.local_rank].finish()
        distributed.destroy_process_group()
        return status


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


# for torchrun ------------------------------------------------------------------------------------------------------------
def main(argv: Sequence[str] | None = None) -> int:
    """Train one run in this process group, without Prefect. Returns 0 done, 2 bad input, 75 interrupted."""
    arguments = _parser().parse_args(argv)
    faulthandler.enable()
    sys.path.insert(0, os.getcwd())
    try:
        config = Config.load(arguments.config, arguments.overrides)
        config = _resolve(config)[0]
    except ConfigError as error:
        if distributed.rank() == 0:
            print(f"danling: {error}", file=sys.stderr)
        return 2
    device = distributed.resolve_device(config.device)
    distributed.init_process_group(device, config.hang_timeout_seconds)
    with contextlib.ExitStack() as stack:
        opened = _open(config, arguments.fresh, stack)
        if opened is None:
            distributed.destroy_process_group()
            return 0
        config, context = opened
        try:
            execute(config, context, config.stages, config.threads_per_rank)
        except RunInterrupted as error:
            if distributed.rank() == 0:
                print(f"danling: interrupted, resumable: {error}", file=sys.stderr)
            return EXIT_INTERRUPTED
    return 0


def _open(config: Config, fresh: bool, stack: contextlib.ExitStack) -> tuple[Config, RunContext] | None:
    """Rank 0 finds or creates the run and holds its lease; all get its folder. Collective. None: it is complete."""
    from danling_core.open_run import open_run

    answer: Any = None
    if distributed.rank() == 0:
        try:
            assert config.runner is not None
            source = getattr(sys.modules.get(import_runner(config.runner).__module__), "__file__", None)
            experiment_id = config.experiment_id or experiment_id_of(source, _stores(config, os.getcwd()))
            config = config.model_copy(update={"experiment_id": experiment_id})
            opened = open_run(config, identify(config, source), fresh=fresh, source_file=source)
            if opened.lease is not None:
                stack.callback(opened.lease.release)
                stack.enter_context(opened.lease.beating())
            control_path = os.path.join(tempfile.mkdtemp(prefix="danling-"), "control")
            Control.create(control_path, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))).close()
            answer = config.dict(), opened, control_path
        except Exception as error:
            answer = error
    answer = distributed.broadcast_object(_without_lease(answer))
    if isinstance(answer, Exception):
        raise answer
    values, folder, work_dir, generation, complete, control_path = answer
    if complete:
        if distributed.rank() == 0:
            print(f"danling: {folder} is complete; --fresh trains it again", file=sys.stderr)
        return None
    control = Control.open(control_path) if os.path.exists(control_path) else None
    return Config.load(values), RunContext(work_dir, folder, generation, _restart_count(), control)


def _without_lease(answer: Any) -> Any:
    if not isinstance(answer, tuple):
        return answer
    values, opened, control_path = answer
    complete = opened.complete is not None
    return values, opened.folder.url, opened.work_dir, opened.generation, complete, control_path


def _restart_count() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node N -m danling_core.worker",
        description="Train one run under torchrun, without Prefect; the same folder and the same bits as `danling run`.",
        epilog="example: torchrun --nproc-per-node 2 -m danling_core.worker run.yaml seed=1 optim.lr=1e-3",
    )
    parser.add_argument(
        "config", help="YAML or JSON file of the run; the config.yaml of a run's folder will do"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides, such as params.lr=0.003"
    )
    parser.add_argument("--fresh", action="store_true", help="begin anew, under a new timestamp")
    return parser


if __name__ == "__main__":
    sys.exit(main())
