"""What the ranks of a node failed of: each leaves a small file, so that the first failure is told, and not its echo."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from typing import Any

from danling_core.launcher.child import describe

_PATIENCE_SECONDS = 2.0
_POLL_SECONDS = 0.02


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
        """Whether this rank's failure was told."""

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
        """Failures of other ranks that are more than an echo."""
        for name in os.listdir(self.folder):
            if name.startswith("failure-") and name.endswith(".json"):
                with open(os.path.join(self.folder, name), encoding="utf-8") as file:
                    failure = json.load(file)
                if not failure["is_lost_peer"]:
                    yield failure


def failure_of(error: BaseException, rank: int, step: int | None) -> dict[str, Any]:
    """An exception as plain JSON types, without secrets: error, traceback, rank, step, time, is_lost_peer."""
    return {**describe(error), "rank": rank, "step": step}
