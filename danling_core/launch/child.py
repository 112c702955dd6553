"""Entry of a process made by the fork server, around the user's code: a rank, or a preparation."""

from __future__ import annotations

import faulthandler
import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from danling_core.errors import ConfigError
from danling_core.parallel.control import Control
from danling_core.parallel.distributed import MEETING_FILE
from danling_core.process_tree import (
    DUMP_STACKS,
    END,
    STOP_SIGNALS,
    children_die_with_us,
    die_with_parent,
    lead_group,
    watch_parent,
)
from danling_core.session.rank_failures import describe

# Variables that elastic sets for a rank; the rest of its environment is the driver's at the time of the request.
_ELASTIC = re.compile(
    r"(GROUP_|ROLE_)?(RANK|WORLD_SIZE)|LOCAL_(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+"
)


def enter_rank(order: Mapping[str, Any]) -> None:
    """Be one rank: called by elastic in a new process, with the order that `group.run_group` made.

    An exception is written to the failure file of the rank before it ends the process, so that the launcher
    knows every rank's, and when each happened, instead of only the first that it noticed.
    """
    local_rank = int(os.environ["LOCAL_RANK"])
    cells = Control.open(order["control_path"]).ranks[local_rank]
    try:
        enter(order)
        os.environ[MEETING_FILE] = order["meeting_path"]
        cells.enter()
        load(order["entrypoint"])(order["request"], order["control_path"], order["restart"])
    except BaseException as error:
        failure = describe(error, own_module=__name__)
        _write_failure(order["failure_path"].format(rank=local_rank), {**failure, "step": cells.step})
        if isinstance(error, Exception):
            raise
        # Elastic takes a silent end for a success.
        raise RuntimeError(failure["error"]) from error
    cells.finish()


def enter_preparation(order: Mapping[str, Any], reply: Connection) -> None:
    """Run the prepare function on each config, in a process of its own, and send what came of it."""
    answers: list[dict[str, Any]] = []
    try:
        enter(order)
        function = load(order["entrypoint"])
        for config in order["configs"]:
            answers.append({"prepared": _prepare_one(function, config, order["cwd"])})
    except ConfigError as error:
        answers.append({"error": str(error)})
    json.dumps(answers)  # an answer that cannot be sent fails here, in the process whose fault it is
    reply.send(answers)


def _prepare_one(function: Callable[..., Any], config: dict[str, Any], cwd: str) -> Any:
    try:
        return function(config, cwd)
    except ConfigError:
        raise
    except BaseException as error:
        what = describe(error, own_module=__name__)
        tail = "\n".join(what["traceback"].rstrip().splitlines()[-12:])
        raise ConfigError(
            f"cannot import runner {config.get('runner')!r}: {what['error']}\n{tail}"
        ) from error


def enter(order: Mapping[str, Any]) -> None:
    """Take on the driver's folder and environment, and tie this process and its children to the launcher.

    Raises:
        ConfigError: the folder is gone, or closed to us.
    """
    for number in (*STOP_SIGNALS, END):  # the fork server has its own ways with these
        signal.signal(number, signal.SIG_DFL)
    # Python's own default, as under torchrun: a child of a fork server would make its children by one, too.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    lead_group()
    die_with_parent()
    server = sys.modules.get("danling_core.launch.fork_server")  # absent where the preload failed
    if server is not None and os.getppid() != server.PID:  # it died before the line above
        os._exit(1)
    children_die_with_us()
    watch_parent(order["launcher_pid"], order["launcher_started"])
    faulthandler.enable(file=2)  # whatever that will be: a rank puts its log there
    faulthandler.register(DUMP_STACKS, file=2, all_threads=True, chain=False)
    take_environment(order["env"])
    try:
        os.chdir(order["cwd"])
    except OSError as error:
        raise ConfigError(
            f"cannot enter the working folder {order['cwd']!r} ({error.strerror}): start from a folder that exists"
        ) from error
    prepend_sys_path(order["cwd"], order["env"].get("PYTHONPATH"))


def take_environment(wanted: Mapping[str, str]) -> None:
    """Replace the environment, which is the fork server's, by `wanted`, except what elastic has just set."""
    kept = {name: value for name, value in os.environ.items() if _ELASTIC.fullmatch(name)}
    os.environ.clear()
    os.environ.update({**wanted, **kept})


def prepend_sys_path(cwd: str, python_path: str | None) -> None:
    """Make modules importable as they are from a script started in `cwd`."""
    entries = [cwd, *(entry for entry in (python_path or "").split(os.pathsep) if entry)]
    sys.path[:] = [*dict.fromkeys(entries), *(entry for entry in sys.path if entry not in entries)]
    importlib.invalidate_caches()


def load(address: str) -> Callable[..., Any]:
    """Return the function at "module:function"."""
    module, _, name = address.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _write_failure(path: str, failure: dict[str, Any]) -> None:
    partial = f"{path}.part"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(failure, file)
    os.replace(partial, path)
