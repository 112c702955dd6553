"""Marks for cases of a parametrised test."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def rarely(cases: Iterable[Any]) -> list[Any]:
    """Leave these cases to `make test-long`: rarer ones of a behaviour that `make test` tries once."""
    marks = pytest.mark.long
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks) for case in cases]
