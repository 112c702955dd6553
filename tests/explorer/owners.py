"""Who owns a run, and what a former owner may still do to it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from danling_core.runs.lease import STALE_AFTER_SECONDS
from tests.explorer.invariants import FENCED, PATIENT, Broken


class Change(NamedTuple):
    """Something that a reader of a run can see.

    Args:
        who: the actor that made it.
        what: `PUT PATH` or `DELETE PATH`.
        waited_seconds: since that actor began.
        is_free: it is a lease after one that was released.
        is_guarded: the lease was listed directly before; None of a disk, where that is no step.
    """

    who: str
    what: str
    waited_seconds: float
    is_free: bool
    is_guarded: bool | None = None


def check_owners(changes: Sequence[Change]) -> None:
    """Check that only the newest owner changes anything, and that no owner was taken for dead too early.

    A process may be paused between the check of its right and the one request that it allows: that one may come late,
    and no request that was not checked, such as a repetition.

    Raises:
        Broken: there was more.
    """
    owner, generation, late = "", 0, 0
    for change in changes:
        found = re.fullmatch(r"PUT .*/lease/(\d+)\.json", change.what)
        if found and int(found[1]) > generation:
            if (
                owner not in ("", change.who)
                and not change.is_free
                and change.waited_seconds < STALE_AFTER_SECONDS
            ):
                raise Broken(PATIENT, f"{change.who} took over after {change.waited_seconds:g} s")
            owner, generation, late = change.who, int(found[1]), 0
        elif change.who != owner and not _is_own_leftover(change.what):
            late += 1
            if late > 1 or (change.is_guarded is False and not _is_old_lease(change.what, generation)):
                raise Broken(FENCED, f"{change.who} made {change.what!r}, and {owner} owns the run")


def _is_own_leftover(what: str) -> bool:
    """Return whether a former owner removes a payload of its own that was never committed."""
    return re.fullmatch(r"DELETE .*/checkpoints/data/.*", what) is not None


def _is_old_lease(what: str, generation: int) -> bool:
    """Return whether a former owner beats or releases, in a file that says nothing any more."""
    found = re.fullmatch(r"PUT .*/lease/(\d+)\.json", what)
    return found is not None and int(found[1]) < generation


def is_guarded(steps: Sequence[str]) -> bool:
    """Return whether the last request of an owner came directly after its listing of the lease.

    The requests of one upload in parts count as one: the client of a store makes them by itself.
    """
    method, _, path = steps[-1].rpartition(" ")
    before = len(steps) - 2
    if method.startswith(("POST complete", "PUT part")):
        while before > 0 and steps[before].startswith("PUT part") and steps[before].endswith(f" {path}"):
            before -= 1
        before -= 1  # the POST that began it
    return before >= 0 and steps[before].startswith("LIST ") and steps[before].endswith("/lease")
