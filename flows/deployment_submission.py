"""Submit runs to a deployment: each once, however many drivers ask for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from prefect import Task
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.runtime import flow_run as runtime
from prefect.states import Completed, Pending

from danling_core import storage
from danling_core.config import Config
from danling_core.launch.plan import RunPlan
from danling_core.session.open_run import lease_parent_url
from flows.busy import IfBusy
from flows.deployment_target import Target
from flows.naming import tags_of

MOST_IN_A_REQUEST = 200


class Submission:
    """The runs of a group on their way to a deployment. Runs are given by their index.

    A flow run's idempotency key says which run it is, where, and which attempt at it: whoever asks for the same again
    gets the flow run that is there.

    Args:
        configs: as given, so that a worker states the code that it has, and not ours.
        fresh: begin new run folders, once for each driver.
    """

    def __init__(
        self,
        target: Target,
        configs: Sequence[Config],
        plans: Sequence[RunPlan],
        fresh: bool,
        if_busy: IfBusy,
    ) -> None:
        self._target = target
        self._configs = configs
        self._plans = plans
        self._fresh = fresh
        self._if_busy = if_busy
        self._flow_run_id = runtime.get_id()

    def submitted(self, client: Any, indices: Sequence[int]) -> dict[int, tuple[int, FlowRun | None]]:
        """Return for each run the attempt to be made, and its flow run where it was submitted already.

        A flow run that has ended, and whose run is not complete, was an attempt of before.
        """
        settled: dict[int, tuple[int, FlowRun | None]] = {}
        attempt, asked = 0, list(indices)
        while asked:
            keys = {self._idempotency_key(index, attempt): index for index in asked}
            wanted = FlowRunFilter.model_validate({"idempotency_key": {"any_": list(keys)}})
            found = {
                keys[str(run.idempotency_key)]: run
                for run in client.read_flow_runs(flow_run_filter=wanted, limit=MOST_IN_A_REQUEST)
            }
            for index in asked:
                run = found.get(index)
                if run is None or not _has_ended(run.state) or (self._fresh and run.state.is_completed()):
                    settled[index] = attempt, run
            asked = [index for index in asked if index not in settled]
            attempt += 1
        return settled

    def create(self, client: Any, index: int, attempt: int) -> FlowRun:
        """Create the run's flow run, below the one at work; where another driver has just done so, return that one."""
        plan = self._plans[index]
        parent = None
        if self._flow_run_id is not None:
            parent = client.create_task_run(
                task=Task(name="run", fn=lambda: None),
                name=plan.key,
                flow_run_id=UUID(self._flow_run_id),
                dynamic_key=f"{plan.key}-{attempt}",
                state=Pending(),
            )
        made: FlowRun = client.create_flow_run_from_deployment(
            self._target.id,
            parameters={
                "config": self._stated(index),
                "overrides": {},
                "fresh": self._fresh,
                "if_busy": self._if_busy,
                "expected_id": plan.identity.id,
            },
            name=plan.identity.name,
            tags=tags_of(plan.config),
            idempotency_key=self._idempotency_key(index, attempt),
            parent_task_run_id=None if parent is None else parent.id,
        )
        if parent is not None and made.parent_task_run_id != parent.id:
            message = f"submitted by another driver, as flow run {made.id}"
            client.set_task_run_state(parent.id, Completed(name="Elsewhere", message=message), force=True)
        return made

    def _stated(self, index: int) -> dict[str, Any]:
        """Return the config for a worker: as it was given, but for the place, which must be the same there."""
        config = self._configs[index]
        root = config.project_root
        if storage.is_local(root):
            config = config.override({"project_root": storage.local_path(root)})
        return config.model_dump(mode="json", exclude_unset=True)

    def _idempotency_key(self, index: int, attempt: int) -> str:
        plan = self._plans[index]
        scope = lease_parent_url(plan.config, plan.identity)
        if self._fresh:  # anew for each driver, once
            scope = f"{self._flow_run_id} {scope}"
        return f"danling-{hashlib.sha256(scope.encode()).hexdigest()[:16]}-{plan.key}-{attempt}"


def _has_ended(state: State[Any] | None) -> bool:
    return state is not None and state.is_final()
