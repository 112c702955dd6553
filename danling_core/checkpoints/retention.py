"""Which checkpoints may go: a decision from records and pointers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from danling_core.checkpoints.record import Record


def pinned(pointers: Mapping[str, Record], names: Sequence[str]) -> set[str]:
    """Return the names of the records that `latest` or a pointer in `names` means."""
    return {record.name for pointer, record in pointers.items() if pointer in ("latest", *names)}


def removable(records: Sequence[Record], keep_last: int, keep: set[str]) -> list[Record]:
    """Return the records beyond the newest `keep_last` that nothing keeps. `records` are newest first."""
    return [record for record in records[keep_last:] if record.name not in keep]


def spare_last_good(
    records: Sequence[Record], removed: Sequence[Record], is_good: Callable[[Record], bool]
) -> list[Record]:
    """Return `removed` without the newest record that verifies, if none of those that stay does."""
    if not removed or any(is_good(record) for record in records if record not in removed):
        return list(removed)
    last_good = next((record for record in removed if is_good(record)), None)
    return [record for record in removed if record != last_good]
