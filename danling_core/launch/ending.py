"""Leave the end of a run in its folder, where its ranks could not do so themselves."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from danling_core.errors import DanLingError, Fenced
from danling_core.launch.messages import Outcome, RunRequest
from danling_core.mirror.process import MirrorProcess
from danling_core.runs.finding import NAME_AND_ID
from danling_core.runs.folder import CHECKPOINTS, RunFolder, Status
from danling_core.runs.lease import check_generation
from danling_core.writers.events import EventLog

logger = logging.getLogger(__name__)

_UPLOAD_SECONDS = 60.0


def record(request: RunRequest, attempt: str, outcome: Outcome, env: Mapping[str, str]) -> Outcome:
    """Write the terminal event of `outcome`, which is not complete, and the status; bring both to the store.

    Args:
        env: of the driver, which holds the credentials of the store.

    Returns the outcome, with what went wrong here added to its error; a complete one where the ranks wrote the
    completion record before they died. Nothing is written for a run that another driver has taken over since.
    """
    if not os.path.isdir(request.work_dir):
        return _with_note(outcome, f"its folder {request.work_dir} is gone")
    folder = RunFolder(request.work_dir)
    try:
        if request.remote_url is None:
            check_generation(folder.lease_url, request.generation)
        known = folder.find_status()
        if known is not None and known.is_complete:
            outcome = Outcome("complete", restarts=outcome.restarts)
        else:
            known = (known or _first_status(folder, request)).model_copy(update=_changes(attempt, outcome))
            folder.write_status(known)
        _emit(request, attempt, outcome, known)
        if request.remote_url is not None:
            _upload(request, request.remote_url, env)
    except Fenced as error:
        logger.warning("the end of %s is not recorded: %s", request.work_dir, error)
    except (DanLingError, OSError) as error:
        return _with_note(outcome, f"the end could not be recorded: {error}")
    return outcome


def _emit(request: RunRequest, attempt: str, outcome: Outcome, status: Status) -> None:
    fields: dict[str, Any]
    if outcome.status == "complete":
        kind, fields = "completed", {"status": status.model_dump(mode="json")}
    elif outcome.status == "failed":
        failure = {"error": outcome.error, "traceback": outcome.traceback, "rank": outcome.rank}
        kind, fields = "failed", {"step": outcome.step, **failure}
    else:
        kind, fields = "interrupted", {"step": outcome.step, "reason": outcome.error}
    log = EventLog(request.events_path, attempt)
    try:
        log.emit(kind, **fields)
    finally:
        log.close()


def _upload(request: RunRequest, remote_url: str, env: Mapping[str, str]) -> None:
    """Rank 0's mirror went with it. This one checks the lease itself; raises Fenced, StoreUnavailable."""
    options = request.config.get("storage_options") or {}
    ours = dict(os.environ)
    os.environ.clear()
    os.environ.update(env)
    try:
        mirror = MirrorProcess(
            request.work_dir,
            remote_url,
            lease_url=RunFolder(remote_url).lease_url,
            generation=request.generation,
            storage_options=options,
            checkpoints=request.config.get("checkpoint_dir_name", CHECKPOINTS),
            drain_seconds=_UPLOAD_SECONDS,
        )
    finally:
        os.environ.clear()
        os.environ.update(ours)
    mirror.close(_UPLOAD_SECONDS + 10.0)


def _changes(attempt: str, outcome: Outcome) -> dict[str, Any]:
    return {
        "status": outcome.status,
        "attempt": attempt,
        "error": outcome.error,
        "updated_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _first_status(folder: RunFolder, request: RunRequest) -> Status:
    """Return a status for a run that failed before rank 0 wrote one, from its folder and its config."""
    config = request.config
    name = config.get("name") or f"{config.get('experiment_name')}-{config.get('run_name')}"
    match = NAME_AND_ID.fullmatch(os.path.basename(os.path.dirname(request.work_dir.rstrip("/"))))
    return Status(
        status="running",
        name=match["name"] if match else name,
        id=match["id"] if match else "",
        experiment_id=config.get("experiment_id") or "",
        experiment_name=config.get("experiment_name") or "",
        run_name=config.get("run_name") or "",
        group=config.get("group"),
        timestamp=folder.timestamp if match else "",
        world_size=request.nproc,
    )


def _with_note(outcome: Outcome, note: str) -> Outcome:
    error = note if outcome.error is None else f"{outcome.error}; {note}"
    return Outcome(**{**outcome.to_dict(), "error": error})
