"""Work in a fork of a rank: whatever it changes is gone with the fork, and only what it raises comes back."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from danling_core import errors
from danling_core.errors import DanLingError
from danling_core.process_tree import die_with_parent

logger = logging.getLogger("danling")

_POLL_SECONDS = 1.0
_END = b"\n"
NO_GROUP = "Default process group has not been initialized"


def can_fork(device: torch.device) -> bool:
    """Return whether a fork can do what this process can on that device: not with a GPU, which belongs to one process.

    Work that touches no GPU, such as reading data, asks for the CPU.
    """
    return device.type == "cpu" and sys.platform.startswith("linux")


def in_a_fork(work: Callable[[], Any], beat: Callable[[], None], limit_seconds: float, name: str) -> Any:
    """Return what `work` returns, called in a fork of this process, on one thread and outside the process group. Any
    rank by itself.

    Args:
        work: returns what JSON can hold.
        name: of the work, for the log.
        beat: called each second, to show that this rank lives.
        limit_seconds: after so long the fork is killed, and nothing is known: a lock may have been held by a thread
            that it does not have.

    Returns:
        None where the fork was killed, or died.

    Raises:
        DanLingError: what `work` raised, of the same type, with its traceback as a note.
    """
    reader, writer = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads: see `limit_seconds`
        child = os.fork()
    if child == 0:
        _work_and_exit(work, writer)
    os.close(writer)
    with contextlib.suppress(OSError):  # it does that as well: whoever comes first
        os.setpgid(child, child)
    try:
        answer = _answer(reader, beat, time.monotonic() + limit_seconds)
    finally:
        os.close(reader)
        os.killpg(child, signal.SIGKILL)  # its loader workers, too
        os.waitpid(child, 0)
    if answer is None:
        logger.info(
            "%s has no result (it took more than %g s, or died): training goes on without",
            *(name, limit_seconds),
        )
        return None
    if "error" in answer:
        error: DanLingError = getattr(errors, answer["error"], DanLingError)(answer["message"])
        error.add_note(answer["told"])
        raise error
    return answer["value"]


def _answer(reader: int, beat: Callable[[], None], end: float) -> dict[str, Any] | None:
    data = b""
    while time.monotonic() < end:
        if not select.select([reader], [], [], _POLL_SECONDS)[0]:
            beat()
            continue
        part = os.read(reader, 1 << 16)
        data += part
        if not part or data.endswith(_END):  # loader workers of the fork may hold the pipe open
            break
    try:
        answer: dict[str, Any] = json.loads(data)
        return answer
    except ValueError:
        return None


def _work_and_exit(work: Callable[[], Any], writer: int) -> NoReturn:
    answer: dict[str, Any] = {"value": None}
    try:
        die_with_parent()
        os.setpgid(0, 0)
        torch.set_num_threads(1)  # the threads of the parent's pool are not here
        _leave_group()
        answer = {"value": work()}
    except DanLingError as error:
        if NO_GROUP not in str(error):  # a step with a collective of its own cannot be tried here
            answer = {"error": type(error).__name__, "message": str(error), "told": traceback.format_exc()}
    except BaseException as error:
        logger.debug("work in a fork was left: %r", error)
    finally:
        try:  # nothing may come out of here into the code of the parent
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            with open(writer, "wb") as file:  # the parent kills this process once it has the answer
                file.write(json.dumps(answer).encode() + _END)
        finally:
            os._exit(0)


def _leave_group() -> None:
    """Have collectives fail at once: this process shares its parent's connections, and must not use them."""
    if dist.is_available() and dist.is_initialized():
        torch.distributed.distributed_c10d._update_default_pg(None)
