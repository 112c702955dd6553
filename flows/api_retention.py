"""`danling prune --api`: deletion of what the orchestrator shows of finished runs. A run's folder is never touched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from danling_core.errors import ConfigError
from flows.cli_deploy import configured_api
from flows.cli_text import say
from flows.exit_codes import DONE
from flows.naming import project_tag

_AGE = re.compile(r"(\d+)([hdw])")
_UNITS = {"h": "hours", "d": "days", "w": "weeks"}
_AT_ONCE = 200
_NAMED = 5


def prune_api(root: str, older_than: str, is_confirmed: bool) -> int:
    """Print which flow runs of a project root may be deleted from Prefect's API, and delete them with --yes.

    Args:
        root: as the runs' configs name it.
        older_than: ended so long ago: `90d`, `12h`, `2w`.
        is_confirmed: delete; without it nothing is.
    """
    before = datetime.now(UTC) - _age(older_than)
    api_url = configured_api()
    found = list(_ended(project_tag(root), before))
    artifacts = sum(_delete(flow_run) for flow_run in found) if is_confirmed else 0
    names = ", ".join(flow_run.name for flow_run in found[:_NAMED]) + (", ..." if len(found) > _NAMED else "")
    what = (
        f"deleted, with their logs and {artifacts} artifacts"
        if is_confirmed
        else "would be deleted; --yes does it"
    )
    say(f"{len(found)} flow runs of {root} at {api_url} ended more than {older_than} ago: {what}")
    if found:
        say(f"  {names}")
    return DONE


def _age(text: str) -> timedelta:
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--older-than is {text!r}, wanted a number with h, d or w, such as 90d")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def _ended(tag: str, before: datetime) -> Iterator[Any]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    wanted = FlowRunFilter.model_validate(
        {
            "tags": {"all_": [tag]},
            "state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}},
            "end_time": {"before_": before},
        }
    )
    with get_client(sync_client=True) as client:
        offset = 0
        while page := client.read_flow_runs(flow_run_filter=wanted, limit=_AT_ONCE, offset=offset):
            yield from page
            offset += len(page)


def _delete(flow_run: Any) -> int:
    """Delete a flow run and its artifacts; return how many those were."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter
    from prefect.exceptions import ObjectNotFound

    of_it = ArtifactFilter.model_validate({"flow_run_id": {"any_": [str(flow_run.id)]}})
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts(artifact_filter=of_it)
        try:
            for artifact in artifacts:
                client.delete_artifact(artifact.id)
            client.delete_flow_run(flow_run.id)
        except ObjectNotFound:  # somebody else deletes, too
            return 0
    return len(artifacts)
