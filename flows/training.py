"""Train one run: open its folder, launch its ranks, follow their events, and say how it ended."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from danling_core.config import Config
from danling_core.errors import (
    CodeChanged,
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
from flows.lineage import flow_runs
from flows.naming import counted
from flows.outcome import RunOutcome
from flows.pool import LauncherPool
from flows.rank_warnings import RankWarnings
from flows.skipping import complete_already
from flows.slots import taken
from flows.view import RunView
from tasks.observation import Event, Observation

logger = logging.getLogger("danling.flows")


def open_and_train(
    config: Config,
    pool: LauncherPool,
    view: RunView,
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
            return _open_or_leave(plan, pool, view, fresh, if_busy)
    except RunInterrupted as error:  # while it waited for its turn
        return RunOutcome(**plan.names, status="interrupted", error=str(error))


def _open_or_leave(
    plan: RunPlan, pool: LauncherPool, view: RunView, fresh: bool, if_busy: IfBusy
) -> RunOutcome:
    """Open the run and train it; where another process has it in work, do as `if_busy` says."""
    while True:
        try:
            return _open_and_train(plan, pool, view, fresh)
        except RunBusy as error:
            if if_busy == "fail":
                return RunOutcome(**plan.names, status="refused", error=str(error))
            logger.warning("%s: %s (if_busy is %r)", plan.key, error, if_busy)
            if (outcome := _leave_to_other(plan, pool, view, if_busy)) is not None:
                return outcome


def _leave_to_other(plan: RunPlan, pool: LauncherPool, view: RunView, if_busy: IfBusy) -> RunOutcome | None:
    """Wait for the process that has the run in work; None where this one is to open the run then."""
    other = other_owner(plan, pool)
    if if_busy == "follow":
        with contextlib.suppress(StorageError):  # its log cannot be read: its end can be waited for
            view.observe(plan, Observation(other.events(), _listener(plan, pool, view)))
    other.wait()
    ended = other.outcome()
    return ended if if_busy == "follow" or pool.why_stopped() is not None else None


def _open_and_train(plan: RunPlan, pool: LauncherPool, view: RunView, fresh: bool) -> RunOutcome:
    try:
        check_sources(plan.sources)
        opened = open_run(
            plan.config, plan.identity, fresh=fresh, source_file=plan.source_file, flow_runs=flow_runs()
        )
    except RunBusy:
        raise
    except (CodeChanged, LeaseError, StorageError, OSError) as error:
        return RunOutcome(**plan.names, status="refused", error=str(error))
    if opened.complete is not None:
        return RunOutcome.from_status(opened.complete, opened.folder, skipped=True, **plan.names)
    try:
        return _train(plan, opened, pool, view)
    except RunInterrupted as error:
        return _ended(plan, opened, status="interrupted", error=str(error))
    except DanLingError as error:
        logger.exception("%s failed", plan.key)
        return _ended(plan, opened, status="failed", error=str(error))
    finally:
        _release(opened)


def _train(plan: RunPlan, opened: OpenedRun, pool: LauncherPool, view: RunView) -> RunOutcome:
    view.open(plan, opened)
    with (
        pool.slot() as launcher,
        pool.active(launcher.run(plan.request(opened))) as handle,
        _beating(opened, handle, pool, plan.key),
    ):
        warnings = RankWarnings(plan.key, text_log_path(plan.config.log_path, opened.work_dir))
        show = _listener(plan, pool, view)

        def listen(event: Event) -> None:
            warnings.pass_on()
            show(event)

        def interrupt(error: BaseException) -> None:
            pool.interrupt_run(handle, f"{type(error).__name__} in its driver")

        view.observe(plan, Observation(handle.events(), listen, logger.warning, interrupt))
        ended = handle.outcome()
        warnings.pass_on()
    view.close(plan, opened.work_dir, opened.folder.url if ended.status == "complete" else None)
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


def _listener(plan: RunPlan, pool: LauncherPool, view: RunView) -> Callable[[Event], None]:
    unit, total = counted(plan.config)

    def listen(event: Event) -> None:
        pool.publish(plan.key, event)
        view.on_event(plan, event)
        if event["event"] == "epoch_finished":
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
