"""Views of a run in the orchestrator while it trains: its stages as task runs, its numbers as artifacts."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from danling_core import storage
from danling_core.launch.plan import RunPlan
from danling_core.runs.folder import RunFolder
from danling_core.session.open_run import OpenedRun
from danling_core.writers.follow import end_of_lines, follow
from flows.lineage import flow_runs
from flows.naming import counted
from flows.page import epoch_rows
from flows.stages import observe_stages, try_task
from tasks.artifacts import FlowArtifacts
from tasks.observation import Event, Observation
from tasks.score import score
from tasks.seed import record_seed
from tasks.store import store

logger = logging.getLogger("danling.flows")


class RunView(Protocol):
    """View of a run. Its methods are called in this order, by the thread that trains the run."""

    def open(self, plan: RunPlan, opened: OpenedRun) -> None:
        """Take note that the run's folder is open, and that it is about to train."""

    def observe(self, plan: RunPlan, observation: Observation) -> None:
        """Read all events of the run, to its end."""

    def on_event(self, plan: RunPlan, event: Event) -> None:
        """Take note of an event as it is read. Must be quick."""

    def close(self, plan: RunPlan, work_dir: str, folder_url: str | None) -> None:
        """Take note that the ranks have ended; `folder_url` is given where the run is complete."""


class FlowView:
    """Shows a run in the flow run that it is made in.

    Args:
        artifacts: of that flow run.
    """

    def __init__(self, artifacts: FlowArtifacts) -> None:
        self._artifacts = artifacts

    def open(self, plan: RunPlan, opened: OpenedRun) -> None:
        """End the flow runs of an owner that is gone, and record the seed."""
        if opened.lease is not None and (dead := opened.lease.predecessor) is not None:
            self._artifacts.conclude_dead(dead.flow_runs, flow_runs(), str(dead))
        config = plan.config
        try_task(
            record_seed, seed=config.seed, world_size=plan.world_size, deterministic=config.deterministic
        )

    def observe(self, plan: RunPlan, observation: Observation) -> None:
        """Open a task run for every stage, for as long as it takes."""
        observe_stages(observation, plan.config)

    def on_event(self, plan: RunPlan, event: Event) -> None:
        """Move the progress bar."""
        if event["event"] == "progress":
            unit, _ = counted(plan.config)
            percent = 100.0 * event.get("progress", 0.0)
            self._artifacts.progress(f"progress-{plan.key}", percent, f"{unit} {event.get(unit)}")

    def close(self, plan: RunPlan, work_dir: str, folder_url: str | None) -> None:
        """Show the table of all epochs and the score, and check what is stored of a complete run."""
        rows = epoch_rows(RunFolder(work_dir))
        self._artifacts.table(f"epochs-{plan.key}", rows, "Every epoch of the run")
        try_task(score, folder_url=work_dir)
        if folder_url is not None:
            try_task(store, folder_url=folder_url)


class LateView:
    """Shows nothing by itself, but lets a flow run that opens late show the run from its beginning.

    The thread that trains calls the methods of a `RunView`; the late flow run's calls `replay`.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._opened: OpenedRun | None = None
        self._offset = 0
        self._closed: tuple[str, str | None] | None = None
        self._has_ended = False

    def open(self, plan: RunPlan, opened: OpenedRun) -> None:
        """Note where the events are to come."""
        with self._changed:
            self._offset = end_of_lines(_log_path(opened))
            self._opened = opened
            self._changed.notify_all()

    def observe(self, plan: RunPlan, observation: Observation) -> None:
        """Read over every stage."""
        while (opening := observation.next_opening()) is not None:
            observation.until_closed(opening)

    def on_event(self, plan: RunPlan, event: Event) -> None:
        """Do nothing: the log has it."""

    def close(self, plan: RunPlan, work_dir: str, folder_url: str | None) -> None:
        """Note what there is to show of the end."""
        self._closed = work_dir, folder_url

    def end(self) -> None:
        """Take note that there will be no more: to be called whatever has come of the run."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def replay(self, plan: RunPlan, view: FlowView) -> None:
        """Show in `view`, that of the flow run at work, all that the run has done and goes on to do; returns when it
        has ended.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._opened is not None or self._has_ended)
        if self._opened is None:
            return
        if self._opened.lease is not None:
            self._opened.lease.name_flow_runs(flow_runs())
        events = follow(_log_path(self._opened), from_offset=self._offset, stop=lambda: self._has_ended)
        view.open(plan, self._opened)
        view.observe(plan, Observation(events, lambda event: view.on_event(plan, event), logger.warning))
        with self._changed:
            self._changed.wait_for(lambda: self._has_ended)
        if self._closed is not None:
            view.close(plan, *self._closed)


def _log_path(opened: OpenedRun) -> str:
    return storage.local_path(RunFolder(opened.work_dir).events_url)
