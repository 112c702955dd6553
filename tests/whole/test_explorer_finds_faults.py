"""The explorer finds faults that are put into the real code: a check of the check."""

from __future__ import annotations

import pytest

from tests.explorer.faults import FAULTS, Fault, find, space_of
from tests.explorer.spaces import explore
from tests.whole.test_crash_points import _quiet  # noqa: F401

_FOUND_LATE = ("complete before the rest", "results cut in place", "scratch trusted after a take-over")


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(each, marks=[pytest.mark.long] if each.what in _FOUND_LATE else [], id=each.what)
        for each in FAULTS
    ],
)
def test_a_fault_breaks_the_invariant_that_names_it(fault: Fault) -> None:
    found = find(fault)
    assert found is not None and found.error.invariant == fault.invariant
    without = explore(space_of(fault), stride=10**9, offset=found.number)
    assert without.counts and not without.broken
