"""Command of each rank under torchrun: `torchrun -m danling_core.worker CONFIG`."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from typing import Any

from danling_core import storage
from danling_core.config import Config
from danling_core.errors import ConfigError, DanLingError, RunInterrupted
from danling_core.identity.ids import identify
from danling_core.launch.prepare import pin
from danling_core.launch.rank import print_once, run_stages
from danling_core.parallel import distributed
from danling_core.parallel.stopping import share
from danling_core.session.context import RunContext
from danling_core.session.rank_failures import RankFailures
from danling_core.writers.console import survive_a_closed_console

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 75

_EPILOG = """\
example: torchrun --nproc-per-node 2 -m danling_core.worker run.yaml seed=1 optim.lr=1e-3

SIGTERM, Ctrl-C and max_seconds save the run, and its ranks exit with 75: the same command resumes it. torchrun
knows no such ending: it prints a banner of a failure and exits with 1 itself, kills ranks that are still saving
30 s after a signal (on several nodes ranks stop at every 16th step only, so 16 steps have to fit, too), and with
--max-restarts it starts a run again that stopped of its own accord. What happened is in the last line of the run's
log. A second Ctrl-C gives that save up; one that is under way already, and its delivery to a store, are waited for.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Train one run in the process group that torchrun made, without Prefect; returns the exit code.

    0 done, 2 bad input, 75 interrupted and resumable; a failure raises, and torchrun ends the other ranks.
    """
    arguments = _parser().parse_intermixed_args(argv)
    survive_a_closed_console()
    faulthandler.enable()
    return train(arguments.config, arguments.overrides, fresh=arguments.fresh)


def train(file: str, overrides: Sequence[str], *, fresh: bool = False, **fields: Any) -> int:
    """Train the run of a file on this rank; returns the exit code. Collective.

    Args:
        fresh: begin anew, under a new timestamp.
        fields: of the config, in place of what the file says; none that is part of a run's identity.
    """
    sys.path.insert(0, os.getcwd())
    try:
        config, _, source = pin(Config.load(file, overrides).replace(**fields))
        device = distributed.resolve_device(config.device)
    except ConfigError as error:
        return _refuse(error, EXIT_BAD_INPUT)
    distributed.init_process_group(device, config.hang_timeout_seconds)
    with contextlib.ExitStack() as stack:
        context = _open_together(config, source, fresh, stack)
        if isinstance(context, DanLingError):
            return _refuse(context, EXIT_BAD_INPUT if isinstance(context, ConfigError) else EXIT_FAILED)
        if isinstance(context, str):
            print_once(f"{context} is complete; --fresh trains it again")
            distributed.destroy_process_group()
            return 0
        try:
            run_stages(config, context, config.stages, config.threads_per_rank)
        except RunInterrupted as error:
            return _refuse(error, EXIT_INTERRUPTED)
    return 0


def _refuse(error: DanLingError, code: int) -> int:
    print_once(str(error))
    return code


def _open_together(
    config: Config, source: str | None, fresh: bool, stack: contextlib.ExitStack
) -> RunContext | DanLingError | str:
    """Find or create the run on rank 0, which holds its lease until `stack` ends. Collective.

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
    stack.enter_context(opened.lease.beating(on_stop=lambda request: os.kill(os.getpid(), signal.SIGTERM)))
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
