"""Names the nearest known key for an unknown one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches


def nearest(key: str, known: Iterable[str]) -> str | None:
    """Return the known key most like `key` (letter case ignored), or None when nothing is near."""
    spelling = {name.lower(): name for name in known}
    matches = get_close_matches(key.lower(), spelling, n=1, cutoff=0.6)
    return spelling[matches[0]] if matches else None


def unknown_key(
    key: str, known: Iterable[str], elsewhere: Mapping[str, list[str] | str] | None = None
) -> str:
    """Return a line for the user about an unknown key.

    Args:
        key: what was found.
        known: the keys that would have been accepted in its place.
        elsewhere: for keys that are called otherwise here, or belong to another section, the dotted keys to use
            instead, or a sentence.
    """
    known = list(known)
    line = f"unknown key {key!r}"
    if elsewhere and isinstance(hint := elsewhere.get(key), str):
        return f"{line}: {hint}"
    if elsewhere and key in elsewhere:
        return f"{line}: did you mean {' or '.join(repr(name) for name in elsewhere[key])}?"
    near = nearest(key, known)
    if near is not None:
        return f"{line}: did you mean {near!r}?"
    if elsewhere is not None:
        return f"{line}: a hyperparameter of your own goes under 'params', as {'params.' + key!r}"
    return f"{line}: known are {', '.join(sorted(known))}"
