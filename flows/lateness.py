"""A flow run that begins long after it was due says so."""

from __future__ import annotations

from datetime import UTC, datetime

from prefect import get_run_logger
from prefect.runtime import flow_run as runtime

from danling_core.results.formatting import format_duration

_LATE_SECONDS = 60.0


def say_if_late() -> None:
    """Log by how much this flow run is late, where that is more than a minute; a retry is not late."""
    due = runtime.get_scheduled_start_time()
    if runtime.get_id() is None or due is None or runtime.get_run_count() > 1:
        return
    seconds = (datetime.now(UTC) - due.astimezone(UTC)).total_seconds()
    if seconds > _LATE_SECONDS:
        get_run_logger().warning(
            "this flow run begins %s after it was due, at %s: no worker was free, or none was there",
            *(format_duration(seconds), due.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")),
        )
