"""Artifacts of flow runs: progress, tables, Markdown; written through the reporter's thread."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import TaskRunFilter
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run as runtime
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Crashed

from tasks.reporter import Reporter


class FlowArtifacts:
    """The artifacts of the flow run it is made in. Methods return at once; the reporter does the calls.

    Args:
        reporter: makes the calls in its own thread.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._flow_run_id: str | None = runtime.get_id()
        self._ids: dict[str, UUID] = {}

    def progress(self, name: str, percent: float, description: str | None = None) -> None:
        """Show a bar from 0 to 100; the same name moves the same bar."""
        self._put("progress", name, percent, description)

    def table(self, name: str, rows: list[dict[str, Any]], description: str | None = None) -> None:
        """Create a table, one mapping per row."""
        self._put("table", name, rows, description)

    def markdown(self, name: str, text: str, description: str | None = None) -> None:
        """Create a page of Markdown; links are written `[text](address)`."""
        self._put("markdown", name, text, description)

    def tag(self, tags: list[str]) -> None:
        """Add tags to the flow run, for one that was created by a deployment and could not know them."""
        missing = sorted(set(tags) - set(runtime.get_tags()))
        if missing and self._flow_run_id is not None:
            flow_run_id, wanted = UUID(self._flow_run_id), [*runtime.get_tags(), *missing]
            self._reporter.submit(f"tags/{flow_run_id}", lambda: _set_tags(flow_run_id, wanted))

    def conclude_dead(self, dead: Sequence[str], successors: Sequence[str], owner: str) -> None:
        """Say of the flow runs of a process that is gone that they have crashed, and who goes on with their run.

        Args:
            dead: their ids; those that have ended otherwise stay as they are.
            successors: flow runs of this process: a retry is the flow run of before.
            owner: the process, in words.
        """
        successor = f"flow run {self._flow_run_id}" if self._flow_run_id else "another process"
        message = f"{owner} is gone, and {successor} goes on with its run"
        for flow_run_id in dict.fromkeys(each for each in dead if each not in successors):
            self._reporter.submit(f"crashed/{flow_run_id}", functools.partial(crash, flow_run_id, message))

    def _put(self, kind: str, name: str, data: Any, description: str | None) -> None:
        if self._flow_run_id is not None:
            key = artifact_key(name)
            self._reporter.submit(
                f"{self._flow_run_id}/{key}", lambda: self._write(kind, key, data, description)
            )

    def _write(self, kind: str, key: str, data: Any, description: str | None) -> None:
        # One retry: a report that cannot be made now is replaced by the next one.
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1}), get_client(sync_client=True) as client:
            if key in self._ids:
                client.update_artifact(self._ids[key], ArtifactUpdate(data=data, description=description))
                return
            made = client.create_artifact(
                ArtifactCreate(
                    type=kind,
                    key=key,
                    data=data,
                    description=description,
                    flow_run_id=UUID(self._flow_run_id),
                )
            )
            self._ids[key] = made.id


def crash(flow_run_id: str, message: str) -> bool:
    """Set a flow run, and its task runs under way, to Crashed; False where it has ended, or is not of this API."""
    with get_client(sync_client=True) as client:
        try:
            flow_run = client.read_flow_run(UUID(flow_run_id))
        except (ObjectNotFound, ValueError):
            return False
        if flow_run.state is None or flow_run.state.is_final():
            return False
        state: State[Any] = Crashed(message=message)
        at_work = {
            "flow_run_id": {"any_": [flow_run_id]},
            "state": {"type": {"any_": ["RUNNING", "PENDING"]}},
        }
        for task_run in client.read_task_runs(task_run_filter=TaskRunFilter.model_validate(at_work)):
            client.set_task_run_state(task_run.id, state, force=True)
        client.set_flow_run_state(flow_run.id, state, force=True)
        return True


def artifact_key(name: str) -> str:
    """Return `name` in the letters that Prefect allows in an artifact's key: lower case, digits, dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "danling"


def _set_tags(flow_run_id: UUID, tags: list[str]) -> None:
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run_id, tags=tags)
