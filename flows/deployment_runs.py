"""Train the runs of an experiment or group as flow runs of a deployment: `executor: deployment`.

The run folders are the record: a driver that dies leaves its runs at work, and the next one takes them over.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import State, StateType
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from danling_core import storage
from danling_core.config import Config
from danling_core.config.sweep import FanOut
from danling_core.errors import ConfigError, DanLingError, StorageError
from danling_core.runs.lease import ask_to_stop
from danling_core.runs.stop_request import StopRequest
from danling_core.session.open_run import lease_parent_url, newest_folder
from flows.busy import IfBusy
from flows.deployment_submission import MOST_IN_A_REQUEST, Submission
from flows.deployment_target import Target
from flows.outcome import RunOutcome
from flows.pool import LauncherPool
from flows.skipping import complete_already

logger = logging.getLogger("danling.flows")
T = TypeVar("T")

_POLL_SECONDS = 2.0
_AWAY_SECONDS = 10.0  # between two looks at the folders, while the API is away
_STOP_SECONDS = 60.0
_UNTAKEN_SECONDS = 60.0
_RAISED = "Flow run encountered an exception: "


def run_by_deployment(
    spec: FanOut, configs: Sequence[Config], pool: LauncherPool, fresh: bool, if_busy: IfBusy
) -> list[RunOutcome]:
    """Have a deployment train each run, `concurrency` under way at a time; how they ended, in order.

    What another driver has submitted and is under way is taken over. An error or a signal in this thread cancels
    all, and goes on; so does a pool that is stopped.

    Args:
        configs: as given, so that a worker states the code that it has, and not ours.
    """
    target = Target.find(spec.deployment)
    return _Driver(target, configs, pool, spec.concurrency, fresh, if_busy).run()


class _Driver:
    def __init__(
        self,
        target: Target,
        configs: Sequence[Config],
        pool: LauncherPool,
        at_a_time: int,
        fresh: bool,
        if_busy: IfBusy,
    ) -> None:
        self._target = target
        self._plans = pool.prepare(configs)
        self._submission = Submission(target, configs, self._plans, fresh, if_busy)
        self._pool = pool
        self._at_a_time = at_a_time
        self._fresh = fresh
        self._outcomes: list[RunOutcome | None] = [None] * len(configs)
        self._twins: dict[str, list[int]] = {}  # by id: experiments of a group may share a run
        for index, plan in enumerate(self._plans):
            self._twins.setdefault(plan.identity.id, []).append(index)
        self._waiting = deque(indices[0] for indices in self._twins.values())
        self._under_way: dict[UUID, int] = {}
        self._is_away = False
        self._why_stopped: str | None = None
        self._look_at = 0.0
        self._untaken_at = time.monotonic() + _UNTAKEN_SECONDS

    def run(self) -> list[RunOutcome]:
        try:
            while self._waiting or self._under_way:
                if (reason := self._pool.why_stopped()) is not None:
                    self._stop(reason)
                    break
                self._fill()
                self._settle()
                self._wait(_POLL_SECONDS if self._under_way or self._waiting else 0.0)
        except BaseException as error:
            self._stop(f"{type(error).__name__} in the driver of the group")
            raise
        return [outcome for outcome in self._outcomes if outcome is not None]

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._pool.why_stopped() is None:
            time.sleep(0.1)

    # submitting

    def _fill(self) -> None:
        """Bring as many runs under way as may be; what the API does not take now is tried again."""
        while self._waiting and len(self._under_way) < self._at_a_time and self._pool.why_stopped() is None:
            room = min(self._at_a_time - len(self._under_way), MOST_IN_A_REQUEST)
            batch = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            left = [index for index in batch if not self._is_complete(index)]
            taken = self._asked(lambda left=left: self._submit(left)) if left else True  # type: ignore[misc]
            if taken is None:
                self._waiting.extendleft(index for index in reversed(left) if not self._is_known(index))
                return

    def _is_known(self, index: int) -> bool:
        return self._outcomes[index] is not None or index in self._under_way.values()

    def _is_complete(self, index: int) -> bool:
        found = None if self._fresh else complete_already([self._plans[index]])
        if found is not None:
            self._end(index, found[0])
        return found is not None

    def _submit(self, indices: list[int]) -> bool:
        """Take over the flow runs that are under way, and create the others."""
        with get_client(sync_client=True) as client:
            for index, (attempt, found) in self._submission.submitted(client, indices).items():
                if found is not None and found.state is not None and found.state.is_completed():
                    self._end(index, self._outcome(index, found.state))  # of a `fresh` that is retried
                    continue
                if found is None:
                    found = self._submission.create(client, index, attempt)
                elif found.id not in self._under_way:
                    logger.info("%s is under way as flow run %s", self._plans[index].key, found.name)
                self._under_way[found.id] = index
        return True

    # following

    def _settle(self) -> None:
        """Take note of the runs that have ended: by their flow runs, and while the API is away by their folders."""
        states = self._asked(self._states)
        if states is None:
            self._settle_by_folders()
            return
        for flow_run_id, index in list(self._under_way.items()):
            deleted: State[Any] = State(type=StateType.CRASHED, message="its flow run was deleted")
            state = states.get(flow_run_id, deleted)
            if state is None or not state.is_final():
                continue
            try:
                outcome = self._outcome(index, state)
            except StorageError as error:
                logger.warning("%s has ended, and cannot be read yet: %s", self._plans[index].key, error)
                continue
            del self._under_way[flow_run_id]
            self._end(index, outcome)
        self._say_if_untaken(states)

    def _states(self) -> dict[UUID, State[Any] | None]:
        ids = list(self._under_way)
        states: dict[UUID, State[Any] | None] = {}
        with get_client(sync_client=True) as client:
            for first in range(0, len(ids), MOST_IN_A_REQUEST):
                some = ids[first : first + MOST_IN_A_REQUEST]
                wanted = FlowRunFilter.model_validate({"id": {"any_": [str(each) for each in some]}})
                found = client.read_flow_runs(flow_run_filter=wanted, limit=MOST_IN_A_REQUEST)
                states.update({run.id: run.state for run in found})
        return states

    def _settle_by_folders(self) -> None:
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + _AWAY_SECONDS
        for flow_run_id, index in list(self._under_way.items()):
            if not self._fresh and self._is_complete(index):
                del self._under_way[flow_run_id]

    def _outcome(self, index: int, state: State[Any]) -> RunOutcome:
        """Return how a run has ended, by its folder and the state of its flow run."""
        plan = self._plans[index]
        with storage.using(plan.config.storage_options):
            folder = newest_folder(plan.config, plan.identity)
            status = None if folder is None else folder.find_status()
        message = (state.message or state.name or "no reason given").removeprefix(_RAISED)
        if folder is None or status is None:
            if state.is_completed():
                message = (
                    f"its flow run is Completed, and its folder is not seen here below {plan.config.project_root}: "
                    "project_root must be a place that workers and this machine both see"
                )
            ending = "failed"
            if state.is_cancelled():
                ending, message = "interrupted", self._why_stopped or message
            return RunOutcome(**plan.names, status=ending, error=message)  # type: ignore[arg-type]
        known = RunOutcome.from_status(status, folder, **plan.names)
        if state.is_completed():
            return replace(known, status="complete", error=None if status.is_complete else status.error)
        if state.is_cancelled():
            return replace(known, status="interrupted", error=self._why_stopped or message)
        return replace(
            known, status="failed", error=message if state.is_failed() else f"{state.name}: {message}"
        )

    def _end(self, index: int, outcome: RunOutcome) -> None:
        for twin in self._twins[self._plans[index].identity.id]:
            self._outcomes[twin] = self._pool.record(replace(outcome, **self._plans[twin].names))

    def _say_if_untaken(self, states: dict[UUID, State[Any] | None]) -> None:
        """Say once in a while that runs wait for a worker that is not there."""
        untaken = sum(1 for state in states.values() if state is not None and state.is_scheduled())
        if not untaken or untaken < len(states):
            self._untaken_at = time.monotonic() + _UNTAKEN_SECONDS
        elif time.monotonic() > self._untaken_at:
            self._untaken_at = time.monotonic() + 10 * _UNTAKEN_SECONDS
            why = self._asked(self._target.why_untaken)
            logger.warning("%d runs are not begun: %s", untaken, why or "the API does not say why")

    # stopping

    def _stop(self, reason: str) -> None:
        """Cancel what is under way, through the API or, where that is away, through the folders; wait for the ends."""
        self._why_stopped = reason
        for index in self._waiting:
            self._end(
                index,
                RunOutcome(**self._plans[index].names, status="interrupted", error=f"not started: {reason}"),
            )
        self._waiting.clear()
        cancelled = []
        for flow_run_id in self._under_way:
            if not self._is_away and self._cancel(flow_run_id, reason):
                cancelled.append(flow_run_id)
        for flow_run_id, index in self._under_way.items():
            if flow_run_id not in cancelled:
                self._ask_to_stop(index, reason)
        end = time.monotonic() + _STOP_SECONDS
        while self._under_way and time.monotonic() < end:
            self._settle()
            time.sleep(_POLL_SECONDS / 4)
        for index in self._under_way.values():
            error = f"{reason}: it was asked to stop, and has not ended yet"
            self._end(index, RunOutcome(**self._plans[index].names, status="interrupted", error=error))
        self._under_way.clear()

    def _cancel(self, flow_run_id: UUID, reason: str) -> bool:
        def cancel() -> bool:
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(flow_run_id, State(type=StateType.CANCELLING, message=reason))
            return True

        return self._asked(cancel) is not None

    def _ask_to_stop(self, index: int, reason: str) -> None:
        plan = self._plans[index]
        try:
            with storage.using(plan.config.storage_options):
                ask_to_stop(lease_parent_url(plan.config, plan.identity), StopRequest(reason))
        except DanLingError as error:
            logger.warning("%s cannot be asked to stop: %s", plan.key, error)

    def _asked(self, question: Callable[[], T]) -> T | None:
        """Return the API's answer; None while it is away, which is said once."""
        try:
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1}):
                answer = question()
        except ConfigError:
            raise
        except Exception as error:
            level = logging.DEBUG if self._is_away else logging.WARNING
            logger.log(
                level, "the API is away, and the runs go on without it: %s: %s", type(error).__name__, error
            )
            self._is_away = True
            return None
        self._is_away = False
        return answer
