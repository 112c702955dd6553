"""The flow of one run: prepare, seed, train and evaluate under observation, score, store."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run as runtime

import flows.own_names  # noqa: F401
from danling_core import storage
from danling_core.config import Config
from danling_core.errors import (
    CodeChanged,
    ConfigError,
    DanLingError,
    LeaseError,
    RunBusy,
    RunInterrupted,
    StorageError,
)
from danling_core.identity.sources import check_sources
from danling_core.launch.client import RunHandle
from danling_core.launch.plan import RunPlan
from danling_core.results.formatting import format_epoch_result
from danling_core.runs.folder import RunFolder
from danling_core.runs.stop_request import StopRequest
from danling_core.session.open_run import OpenedRun, open_run
from danling_core.session.writers import text_log_path
from flows.busy import IfBusy, other_owner
from flows.cancellation import heeding_cancel
from flows.credentials import store_credentials
from flows.endings import conclude_run
from flows.lineage import flow_runs, in_flow_run
from flows.naming import counted, run_display_name, tags_of
from flows.outcome import RunOutcome
from flows.page import epoch_rows, run_page
from flows.parameters import Overrides
from flows.pool import LauncherPool, launcher_pool
from flows.rank_warnings import RankWarnings
from flows.skipping import complete_already
from flows.slots import taken
from flows.stages import observe_stages, try_task
from tasks.artifacts import FlowArtifacts
from tasks.observation import Event, Observation
from tasks.reporter import reporting
from tasks.score import score
from tasks.seed import record_seed
from tasks.store import store

logger = logging.getLogger("danling.flows")


def _flow_run_name() -> str:
    parameters = runtime.get_parameters()
    with contextlib.suppress(ConfigError):  # the flow's body raises it, where it has a message
        return run_display_name(_effective(parameters["config"], parameters.get("overrides")))
    return run_display_name(parameters["config"])


@flow(name="run", flow_run_name=_flow_run_name, persist_result=False)
def run(
    config: Config,
    overrides: Overrides = {},  # noqa: B006 - Prefect copies it; null would hide the schema's own message
    fresh: bool = False,
    if_busy: IfBusy = "follow",
) -> State[dict[str, Any]]:
    """Train and evaluate one run; when it is complete already, return what it left.

    Args:
        config: the run.
        overrides: dotted changes of the config, such as `{"params.lr": 0.01}`.
        fresh: begin a new run folder, whatever is there. A retry of this flow run goes on with the folder that it made.
        if_busy: what to do where another process has the run in work: follow it, wait for its end and go on then, or
            fail.
    """
    config = _effective(config, overrides)
    with (
        in_flow_run(),
        store_credentials([config]),
        launcher_pool() as pool,
        reporting() as reporter,
        storage.using(config.storage_options),
    ):
        artifacts = FlowArtifacts(reporter)
        artifacts.tag(tags_of(config))
        outcome = pool.record(open_and_train(config, pool, artifacts, fresh, if_busy))
        artifacts.markdown(f"run-{outcome.key}", run_page(outcome), "The run and where its files are")
        if outcome.traceback:
            get_run_logger().error("rank %s failed:\n%s", outcome.rank, outcome.traceback)
    return conclude_run(outcome)


def open_and_train(
    config: Config,
    pool: LauncherPool,
    artifacts: FlowArtifacts,
    fresh: bool = False,
    if_busy: IfBusy = "follow",
) -> RunOutcome:
    """Open the run, train it unless it is complete, and say how it ended.

    Raises:
        ConfigError: the config cannot be run; nothing was created.
    """
    [plan] = pool.prepare([config])
    needs_slots = plan.config.slots and (fresh or complete_already([plan]) is None)
    try:
        with pool.alone(plan), taken(plan.config.slots if needs_slots else {}, pool):
            return _open_or_leave(plan, pool, artifacts, fresh, if_busy)
    except RunInterrupted as error:  # while it waited for its turn
        return RunOutcome(**plan.names, status="interrupted", error=str(error))


def _open_or_leave(
    plan: RunPlan, pool: LauncherPool, artifacts: FlowArtifacts, fresh: bool, if_busy: IfBusy
) -> RunOutcome:
    """Open the run and train it; where another process has it in work, do as `if_busy` says."""
    while True:
        try:
            return _open_and_train(plan, pool, artifacts, fresh)
        except RunBusy as error:
            if if_busy == "fail":
                return RunOutcome(**plan.names, status="refused", error=str(error))
            logger.warning("%s: %s (if_busy is %r)", _key(plan), error, if_busy)
            if (outcome := _leave_to_other(plan, pool, artifacts, if_busy)) is not None:
                return outcome


def _leave_to_other(
    plan: RunPlan, pool: LauncherPool, artifacts: FlowArtifacts, if_busy: IfBusy
) -> RunOutcome | None:
    """Wait for the process that has the run in work; None where this one is to open the run then."""
    other = other_owner(plan, pool)
    if if_busy == "follow":
        with contextlib.suppress(StorageError):  # its log cannot be read: its end can be waited for
            observe_stages(Observation(other.events(), _listener(plan, pool, artifacts)), plan.config)
    other.wait()
    ended = other.outcome()
    return ended if if_busy == "follow" or pool.why_stopped() is not None else None


def _open_and_train(plan: RunPlan, pool: LauncherPool, artifacts: FlowArtifacts, fresh: bool) -> RunOutcome:
    try:
        check_sources(plan.sources)
        opened = open_run(
            plan.config, plan.identity, fresh=fresh, source_file=plan.source_file, flow_runs=flow_runs()
        )
    except RunBusy:
        raise
    except (CodeChanged, LeaseError, StorageError, OSError) as error:
        return RunOutcome(**plan.names, status="refused", error=str(error))
    if opened.lease is not None and opened.lease.predecessor is not None:
        artifacts.conclude_dead(
            opened.lease.predecessor.flow_runs, flow_runs(), str(opened.lease.predecessor)
        )
    if opened.complete is not None:
        return RunOutcome.from_status(opened.complete, opened.folder, skipped=True, **plan.names)
    try:
        return _train(plan, opened, pool, artifacts)
    except RunInterrupted as error:
        return _ended(plan, opened, status="interrupted", error=str(error))
    except DanLingError as error:
        logger.exception("%s failed", _key(plan))
        return _ended(plan, opened, status="failed", error=str(error))
    finally:
        _release(opened)


def _train(plan: RunPlan, opened: OpenedRun, pool: LauncherPool, artifacts: FlowArtifacts) -> RunOutcome:
    config = plan.config
    try_task(record_seed, seed=config.seed, world_size=plan.world_size, deterministic=config.deterministic)
    with (
        pool.slot() as launcher,
        pool.active(launcher.run(plan.request(opened))) as handle,
        heeding_cancel(lambda reason: pool.interrupt_run(handle, reason)),
        _beating(opened, handle, pool, _key(plan)),
    ):
        warnings = RankWarnings(_key(plan), text_log_path(config.log_path, opened.work_dir))
        show = _listener(plan, pool, artifacts)

        def listen(event: Event) -> None:
            warnings.pass_on()
            show(event)

        def interrupt(error: BaseException) -> None:
            pool.interrupt_run(handle, f"{type(error).__name__} in its driver")

        observe_stages(Observation(handle.events(), listen, logger.warning, interrupt), config)
        ended = handle.outcome()
        warnings.pass_on()
    artifacts.table(f"epochs-{_key(plan)}", epoch_rows(RunFolder(opened.work_dir)), "Every epoch of the run")
    try_task(score, folder_url=opened.work_dir)
    if ended.status == "complete":
        try_task(store, folder_url=opened.folder.url)
    known = {name: getattr(ended, name) for name in ("status", "error", "traceback", "rank", "is_bad_input")}
    return _ended(plan, opened, **known)


def _beating(
    opened: OpenedRun, handle: RunHandle, pool: LauncherPool, key: str
) -> AbstractContextManager[Any]:
    if opened.lease is None:
        raise LeaseError(f"{opened.folder.url} is to be written without a lease")

    def stop(request: StopRequest) -> None:
        reason = f"stopped by {request.by}"
        logger.warning("%s is %s", key, reason)
        return pool.interrupt(reason) if request.session else pool.interrupt_run(handle, reason)

    return opened.lease.beating(on_fenced=lambda error: pool.interrupt_run(handle, str(error)), on_stop=stop)


def _key(plan: RunPlan) -> str:
    return f"{plan.identity.name}-{plan.identity.id}"


def _listener(plan: RunPlan, pool: LauncherPool, artifacts: FlowArtifacts) -> Callable[[Event], None]:
    key, (unit, total) = _key(plan), counted(plan.config)

    def listen(event: Event) -> None:
        pool.publish(key, event)
        if event["event"] == "progress":
            percent = 100.0 * event.get("progress", 0.0)
            artifacts.progress(f"progress-{key}", percent, f"{unit} {event.get(unit)}")
        elif event["event"] == "epoch_finished":
            logger.info("%s", format_epoch_result(event["result"], event["index"], total, label=unit))

    return listen


def _release(opened: OpenedRun) -> None:
    """Give the lease up; where the store is away, others find it stale after a while."""
    try:
        if opened.lease is not None:
            opened.lease.release()
    except StorageError as error:
        logger.warning("the lease of %s is not released: %s", opened.folder.url, error)


def _ended(plan: RunPlan, opened: OpenedRun, **known: Any) -> RunOutcome:
    """Make the outcome from the local folder (the store may be away), with `known` on top."""
    status = RunFolder(opened.work_dir).find_status()
    if status is None:
        return RunOutcome(**{**plan.names, "folder": opened.folder.url, **known})
    # The stages asked for are done, others are not.
    if known["status"] == "complete" and not status.is_complete:
        known["error"] = status.error
    return RunOutcome.from_status(status, opened.folder, **plan.names, **known)


def _effective(config: Config, overrides: dict[str, Any] | None) -> Config:
    return config.override(overrides) if overrides else config
