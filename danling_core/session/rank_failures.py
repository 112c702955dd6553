"""Failures of a node's ranks: each leaves a small file, so that the first failure is the one reported."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import traceback
from collections.abc import Iterator
from typing import Any

from danling_core.errors import ConfigError
from danling_core.secrets import redact

_PATIENCE_SECONDS = 2.0
_POLL_SECONDS = 0.02
_LOST_PEER = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|was aborted|remote process exited|"
    r"timed out waiting"
)


class RankFailures:
    """The failures of one node's ranks under torchrun; our own launcher has its own way.

    Args:
        folder: local, shared by the ranks of the node.
        rank: of this process.
    """

    def __init__(self, folder: str, rank: int) -> None:
        self.folder = folder
        self.rank = rank
        self.is_settled = False
        """Whether this rank's failure was recorded."""

    def settle(self, error: BaseException, step: int | None) -> dict[str, Any]:
        """Tell the other ranks of `error`, and say which failure is to be recorded.

        Rank 0, if it has only lost a peer, waits up to two seconds for what that one says.

        Returns:
            error, traceback, rank, step, time and is_lost_peer, without secrets.
        """
        self.is_settled = True
        own = failure_of(error, self.rank, step)
        self._write(own)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self.rank == 0 and own["is_lost_peer"] and time.monotonic() < deadline:
            first = min(self._others(), key=lambda each: float(each["time"]), default=None)
            if first is not None:
                return first
            time.sleep(_POLL_SECONDS)
        return own

    def _write(self, failure: dict[str, Any]) -> None:
        path = os.path.join(self.folder, f"failure-{self.rank}.json")
        with contextlib.suppress(FileNotFoundError):  # whoever would have read it has left
            with open(f"{path}.part", "w", encoding="utf-8") as file:
                json.dump(failure, file)
            os.replace(f"{path}.part", path)

    def _others(self) -> Iterator[dict[str, Any]]:
        """Yield failures of other ranks that are not a consequence of a lost peer."""
        for name in os.listdir(self.folder):
            if name.startswith("failure-") and name.endswith(".json"):
                with open(os.path.join(self.folder, name), encoding="utf-8") as file:
                    failure = json.load(file)
                if not failure["is_lost_peer"]:
                    yield failure


def failure_of(error: BaseException, rank: int, step: int | None) -> dict[str, Any]:
    """Return an exception as plain JSON types, without secrets: error, traceback, rank, step, time, is_lost_peer."""
    return {**describe(error), "rank": rank, "step": step}


def describe(error: BaseException, own_module: str | None = None) -> dict[str, Any]:
    """Return an exception as plain JSON types: one line, traceback, time, whether it may follow from another's, and
    whether it is a refusal of what the user gave.

    Secrets are taken out, and the first frames too where they are those of `own_module`.
    """
    is_bad_input = isinstance(error, ConfigError)
    if is_bad_input:
        line = str(error)
    elif isinstance(error, SystemExit):
        line = f"the code called sys.exit({error.code!r})"
    else:
        line = "".join(traceback.format_exception_only(type(error), error)).strip()
    own = error.__traceback__
    while own is not None and own.tb_frame.f_globals.get("__name__") == own_module:
        own = own.tb_next
    text = "".join(traceback.format_exception(type(error), error, own or error.__traceback__))
    return {
        "error": redact(line),
        "traceback": redact(text),
        "time": time.time(),
        "is_lost_peer": is_lost_peer(error),
        "is_bad_input": is_bad_input,
    }


def is_lost_peer(error: BaseException) -> bool:
    """Return whether the error may be a mere consequence of another process's death."""
    if isinstance(error, ConfigError) or not isinstance(error, (RuntimeError, OSError)):
        return False
    # By name: this module loads no torch.
    if any(base.__name__ == "DistError" for base in type(error).__mro__):
        return True
    text = str(error).lower()
    if "dataloader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text):
        return True
    is_ours = any(word in text for word in ("gloo", "nccl", "socket", "tcpstore", "connection", "pair.cc"))
    return is_ours and _LOST_PEER.search(text) is not None
