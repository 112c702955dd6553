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
    """

    who: str
    what: str
    waited_seconds: float
    is_free: bool


def check_owners(changes: Sequence[Change]) -> None:
    """Check that only the newest owner changes anything, and that no owner was taken for dead too early.

    A process may be paused between the check of its right and the one request that it allows: that one may come late.

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
        if late > 1:
            raise Broken(FENCED, f"{change.who} made {change.what!r}, and {owner} owns the run")


def _is_own_leftover(what: str) -> bool:
    """Return whether a former owner removes a payload of its own that was never committed."""
    return re.fullmatch(r"DELETE .*/checkpoints/data/.*", what) is not None
