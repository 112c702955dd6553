"""Decide what a group's end means: which rank failed first, and whether a relaunch may help."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from danling_core.launch.watch import Hang

_UNKNOWN_EXIT = 255  # of multiprocessing, where the fork server died before it could tell


@dataclass(frozen=True)
class RankEnd:
    """End of one rank.

    Args:
        exit_code: negative for a signal; None if it was never started.
        failure: what its failure file says, where it raised (see `child.describe`).
        was_killed: by the launcher, for another rank's sake or after the grace.
    """

    exit_code: int | None
    is_done: bool
    step: int | None
    failure: Mapping[str, Any] | None = None
    was_killed: bool = False


@dataclass(frozen=True)
class GroupEnd:
    """End of a group: its ranks in order, the hang that was found, and the error of elastic itself."""

    ranks: list[RankEnd]
    hang: Hang | None = None
    launch_error: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The first failure. A death or a hang may be cured by a relaunch, an exception is not."""

    kind: Literal["none", "raised", "died", "hung", "not launched"]
    message: str
    rank: int | None = None
    step: int | None = None
    traceback: str | None = field(default=None, repr=False)
    is_bad_input: bool = False
    """Whether a rank refused what the user gave, before its first step."""

    @property
    def is_restartable(self) -> bool:
        """Return whether trying again may help."""
        return self.kind in ("died", "hung", "not launched")


def judge(end: GroupEnd) -> Verdict:
    """Find the first failure of a group.

    The order in which the deaths were noticed says little, as all happen within milliseconds. So: an
    exception that cannot follow from a lost peer comes first; then a hang; then a death without an
    exception that we did not cause; then one that may follow from it; last what elastic says, which may be no more than
    its own trouble with reading a rank's error.
    """
    raised = sorted(
        (rank.failure["time"], index) for index, rank in enumerate(end.ranks) if rank.failure is not None
    )
    own = [index for _, index in raised if not _failure(end.ranks[index])["is_lost_peer"]]
    if own and end.hang is None:
        return _raised(own[0], end.ranks[own[0]])
    if end.hang is not None:
        return _hung(end.hang)
    silent = [index for index, rank in enumerate(end.ranks) if _died_silently(rank)]
    silent.sort(key=lambda index: end.ranks[index].exit_code == -signal.SIGTERM)  # elastic's, to the others
    if silent:
        return _died(silent[0], end.ranks[silent[0]])
    if raised:
        return _lost_peer(raised[0][1], end.ranks[raised[0][1]])
    if end.launch_error is not None:
        return Verdict("not launched", end.launch_error)
    return Verdict("none", "the ranks ended without a terminal event")


def _failure(rank: RankEnd) -> Mapping[str, Any]:
    return rank.failure or {}


def _died_silently(rank: RankEnd) -> bool:
    return rank.failure is None and not rank.is_done and not rank.was_killed and rank.exit_code is not None


def _raised(index: int, rank: RankEnd) -> Verdict:
    failure = _failure(rank)
    is_bad_input = rank.step is None and bool(failure.get("is_bad_input"))
    message = f"rank {index} failed{_at(rank.step)}: {failure['error']}"
    if is_bad_input:
        message = failure["error"]
    return Verdict("raised", message, index, rank.step, failure["traceback"], is_bad_input)


def _lost_peer(index: int, rank: RankEnd) -> Verdict:
    found = _raised(index, rank)
    # That of a loader's worker is a death like any other.
    is_worker_killed = "killed by signal" in _failure(rank)["error"]
    return Verdict("died" if is_worker_killed else "raised", found.message, index, rank.step, found.traceback)


def _hung(hang: Hang) -> Verdict:
    message = (
        f"rank {hang.rank} hung{_at(hang.step)}: silent for {hang.silent_seconds:.0f} s; "
        "the stacks of all ranks are in their logs, unless log=false; if it was only slow, raise hang_timeout_seconds"
    )
    return Verdict("hung", message, hang.rank, hang.step)


def _died(index: int, rank: RankEnd) -> Verdict:
    code = rank.exit_code or 0
    where = _at(rank.step)
    if code < 0:
        hint = ": out of memory?" if code == -signal.SIGKILL else ""
        message = f"rank {index} was killed by {signal_name(-code)}{where}{hint}"
        return Verdict("died", message, index, rank.step)
    if code == _UNKNOWN_EXIT:
        return Verdict("died", f"rank {index} died with the fork server{where}", index, rank.step)
    message = f"rank {index} exited with code {code}{where}, without an exception: something called os._exit"
    return Verdict("raised", message, index, rank.step)


def _at(step: int | None) -> str:
    return " before its first step" if step is None else f" at step {step}"


def signal_name(number: int) -> str:
    """Return the name, as in `SIGSEGV`."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
