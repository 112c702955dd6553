"""Work in a fork of a rank: whatever it changes is gone with the fork, and only what it raises comes back."""

from __future__ import annotations

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
from typing import NoReturn

import torch
import torch.distributed as dist

from danling_core import errors
from danling_core.errors import DanLingError
from danling_core.process_tree import die_with_parent

logger = logging.getLogger("danling")

_POLL_SECONDS = 1.0
NO_GROUP = "Default process group has not been initialized"


def can_fork(device: torch.device) -> bool:
    """Return whether a fork can do what this process can: not with a GPU, which belongs to one process."""
    return device.type == "cpu" and sys.platform.startswith("linux") and not torch.cuda.is_initialized()


def in_a_fork(work: Callable[[], None], beat: Callable[[], None], limit_seconds: float) -> None:
    """Call `work` in a fork of this process, on one thread and outside the process group. Any rank by itself.

    Args:
        beat: called each second, to show that this rank lives.
        limit_seconds: after so long the fork is killed, and nothing is known: a lock may have been held by a thread
            that it does not have.

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
    try:
        answer = _answer(reader, beat, time.monotonic() + limit_seconds)
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if answer is None:
        logger.info(
            "the look before the first step has no result (it took more than %g s, or died): training begins without",
            limit_seconds,
        )
    elif answer[0] is not None:
        name, message, told = answer
        error: DanLingError = getattr(errors, str(name), DanLingError)(message)
        error.add_note(told)
        raise error


def _answer(reader: int, beat: Callable[[], None], end: float) -> tuple[str | None, str, str] | None:
    data = b""
    while time.monotonic() < end:
        if not select.select([reader], [], [], _POLL_SECONDS)[0]:
            beat()
            continue
        part = os.read(reader, 1 << 16)
        if not part:
            break
        data += part
    try:
        name, message, told = json.loads(data)
        return name, message, told
    except ValueError:
        return None


def _work_and_exit(work: Callable[[], None], writer: int) -> NoReturn:
    answer: tuple[str | None, str, str] = (None, "", "")
    try:
        die_with_parent()
        torch.set_num_threads(1)  # the threads of the parent's pool are not here
        _leave_group()
        work()
    except DanLingError as error:
        if NO_GROUP not in str(error):  # a step with a collective of its own cannot be tried here
            answer = type(error).__name__, str(error), traceback.format_exc()
    except BaseException as error:
        logger.debug("the look before the first step was left: %r", error)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        with open(writer, "wb") as file:  # the parent kills this process once it has the answer
            file.write(json.dumps(answer).encode())
        os._exit(0)


def _leave_group() -> None:
    """Have collectives fail at once: this process shares its parent's connections, and must not use them."""
    if dist.is_available() and dist.is_initialized():
        torch.distributed.distributed_c10d._update_default_pg(None)
