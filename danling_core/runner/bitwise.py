"""Reasons why a resumed run is not bitwise equal to one that was never interrupted, found when its state is loaded."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from danling_core.data import facts
from danling_core.data.generators import KINDS
from danling_core.parallel.environment import environment, what_differs
from danling_core.runner.parts import Parts
from danling_core.runner.values import fingerprint


def compare_device(parts: Parts, before: str | None) -> None:
    """Compare the device of a checkpoint with this one."""
    here = parts.ranks.device.type
    if before not in (None, here):
        parts.setup.not_bitwise(f"the run was on {before} and goes on with {here}")


def compare_environment(parts: Parts, before: Mapping[str, str] | None) -> None:
    """Compare what bits depend on: CPU kind, libraries, flags."""
    found = what_differs(before or {}, environment(parts.ranks.device))
    if found:
        parts.setup.not_bitwise(", ".join(found))


def compare_data(parts: Parts, before: Mapping[str, Any] | None) -> None:
    """Compare the facts of each split's data; and name generators that nobody saves."""
    found = facts.what_differs(before or {}, parts.splits.given.facts())
    if found:
        parts.setup.not_bitwise(f"the data has changed: {'; '.join(found)}")
    if uncovered := parts.splits.given.uncovered_generators():
        parts.setup.not_bitwise(
            f"{', '.join(uncovered)} draws in loader workers of your own, and nobody saves what it drew"
        )


def sampler_states(parts: Parts) -> dict[str, int]:
    """Return a hash of what each sampler of the user's holds, but for what begins anew with each pass."""
    return {name: _sampler_state(each) for name, each in parts.splits.given.stateful().items()}


def _sampler_state(sampler: Any) -> int:
    with contextlib.suppress(Exception):  # one that cannot be copied is looked at as it is
        sampler = copy.copy(sampler)
        if callable(set_epoch := getattr(sampler, "set_epoch", None)):
            set_epoch(0)
    return fingerprint(sampler, lambda value: isinstance(value, (Dataset, *KINDS)) and value is not sampler)


def compare_samplers(parts: Parts, before: Mapping[str, int] | None) -> None:
    """Name the samplers that hold something else than when the checkpoint was made."""
    now = sampler_states(parts)
    for split, stream in parts.splits.streams.items():
        if stream.recall is not None:  # compared by what it gives
            now.pop(f"datasets[{split!r}]", None)
    for name, state in (before or {}).items():
        if name in now and now[name] != state:
            parts.setup.not_bitwise(f"self.{name} has a state of its own, which no checkpoint holds")


def load_attributes(parts: Parts, state: Mapping[str, Any] | None) -> None:
    """Load the states and values of the user's attributes; name those that were not saved, or cannot be put back."""
    if not state or parts.attributes is None:
        return
    parts.attributes.load_state_dict(state)
    for name, reason in parts.attributes.not_restored.items():
        parts.setup.not_bitwise(f"self.{name} cannot be put back: {reason}")
    if lost := state.get("lost"):
        names = ", self.".join(lost)
        parts.setup.not_bitwise(f"training had changed self.{names}, which no checkpoint can hold")
