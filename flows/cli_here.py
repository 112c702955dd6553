"""`danling run CONFIG --here`: one run in this process and this terminal, for a debugger; without Prefect."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from danling_core.config import Config
from danling_core.errors import ConfigError, DanLingError
from flows.cli_text import say
from flows.exit_codes import BAD_INPUT, FAILED, INTERRUPTED


def run_here(file: str, overrides: Sequence[str], *, fresh: bool, debug: bool) -> int:
    """Train one run on one rank, in its folder, as `danling run` does on all of them; return the exit code.

    `breakpoint()` opens the debugger in a step. There is no look before the first step, which would be in a fork.

    Args:
        fresh: begin a new run folder.
        debug: open the debugger where an exception was raised.
    """
    if Config.load(file, overrides).storage_block is not None:
        raise ConfigError(
            "storage_block names credentials that Prefect keeps, and --here goes without Prefect: set "
            "storage_block=null, and the store's own environment variables"
        )
    from danling_core import worker

    try:
        return worker.train(file, overrides, fresh=fresh, sanity_batches=0)
    except KeyboardInterrupt:
        say(
            "danling: interrupted in the middle of a step; the same command goes on from the last checkpoint",
            sys.stderr,
        )
        return INTERRUPTED
    except Exception as error:
        kind = "" if isinstance(error, DanLingError) else f"{type(error).__name__}: "
        say(f"danling: {kind}{error}", sys.stderr)  # the log has shown its traceback
        if debug:
            _examine(error)
        return BAD_INPUT if isinstance(error, ConfigError) else FAILED


def _examine(error: BaseException) -> None:
    """Open the debugger where an error was raised; where ours only explains another one, there."""
    import pdb

    while isinstance(error, DanLingError) and error.__cause__ is not None:
        error = error.__cause__
    print("the debugger: `up` and `down` move, `p NAME` shows, `q` leaves", file=sys.stderr)
    pdb.post_mortem(error.__traceback__)
