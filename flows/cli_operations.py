"""`danling stop`, `danling resume`, `danling doctor`: what is done about runs that are at work, stopped or dead."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from datetime import UTC, datetime
from typing import Any

from danling_core import storage
from danling_core.errors import ConfigError, NotFound
from danling_core.results.formatting import format_duration
from danling_core.runs import metadata
from danling_core.runs.finding import list_runs, resolve
from danling_core.runs.folder import RunFolder, Status
from danling_core.runs.lease import STALE_AFTER_SECONDS, ask_to_stop, current_owner
from danling_core.runs.lease_owner import Owner, is_dead
from danling_core.runs.stop_request import StopRequest
from danling_core.runs.watching import OwnerWatch
from flows.cli_list import moved
from flows.cli_text import say
from flows.exit_codes import DONE, FAILED

logger = logging.getLogger("danling")

_POLL_SECONDS = 0.5
# The worker of Prefect reports a process that was killed twice, 2.6 s apart: a retry in between is overwritten.
_SETTLED_AFTER_SECONDS = 5.0


def stop_runs(root: str, text: str, wait_seconds: float) -> int:
    """Ask the owners of a run, or of all runs of a group, to save and stop, and wait for their ends."""
    folders, is_group = _meant(root, text)
    request = StopRequest(f"{metadata.user_name()} on {socket.gethostname()}", session=is_group)
    asked: list[RunFolder] = []
    for folder in folders:
        owner = ask_to_stop(folder.lease_parent_url, request)
        if owner is None:
            if not is_group:
                say(f"{_name(folder)} is not at work: {_how_it_is(folder)}")
            continue
        say(f"{_name(folder)}: asked {owner} to save and stop")
        asked.append(folder)
    if is_group and not asked:
        say(f"no run of the group {text!r} is at work")
    return _wait_for_ends(asked, wait_seconds) if asked and wait_seconds > 0 else DONE


def _meant(root: str, text: str) -> tuple[list[RunFolder], bool]:
    """Return the run that is meant, or the runs of the group, and whether it is a group."""
    try:
        return [resolve(root, text)], False
    except NotFound:
        folders = [
            folder for folder, status in list_runs(root) if status is not None and status.group == text
        ]
        if not folders:
            raise
        return folders, True


def _wait_for_ends(asked: list[RunFolder], wait_seconds: float) -> int:
    left = {folder: OwnerWatch(folder.lease_parent_url) for folder in asked}
    end = time.monotonic() + wait_seconds
    while left and time.monotonic() < end:
        for folder in [folder for folder, watch in left.items() if watch.look() != "at work"]:
            del left[folder]
            say(f"{_name(folder)}: {_how_it_is(folder)}")
        time.sleep(_POLL_SECONDS)
    for folder in left:
        say(
            f"{_name(folder)} has not stopped within {wait_seconds:g} s; it will at its next beat",
            file=sys.stderr,
        )
    return FAILED if left else DONE


def _name(folder: RunFolder) -> str:
    return storage.base_name(storage.parent(folder.url))


def _how_it_is(folder: RunFolder) -> str:
    status = folder.find_status()
    return "nothing is known of it" if status is None else f"{status.status} after {status.epochs} epochs"


def resume_run(root: str, text: str, here: bool, verbose: bool) -> int:
    """Go on with a run: by a retry of the flow run of its deployment, or in this terminal."""
    folder = resolve(root, text)
    status = folder.find_status()
    if status is not None and status.is_complete:
        say(f"{_name(folder)} is complete: there is nothing to resume")
        return DONE
    flow_run_id = None if here else _flow_run_of(folder)
    if flow_run_id is not None and _retry(flow_run_id, folder):
        return DONE
    from flows.cli_train import Training

    words = ["run", folder.config_url]
    return Training(False, verbose, words).run(folder.config_url, moved(folder))


def _flow_run_of(folder: RunFolder) -> str | None:
    """Return the outermost flow run of the newest attempt at a run; None where there was none."""
    try:
        attempts = metadata.read(folder.metadata_url).get("attempts") or [{}]
    except NotFound:
        return None
    found = attempts[-1].get("flow_run") if isinstance(attempts[-1], dict) else None
    return found if isinstance(found, str) else None


def _retry(flow_run_id: str, folder: RunFolder) -> bool:
    """Have the worker run a deployment's flow run once more; False where the API has no such one."""
    from uuid import UUID

    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.settings import PREFECT_API_URL
    from prefect.states import Scheduled

    from flows.server import why_unusable

    if PREFECT_API_URL.value() is None:
        return False
    if (reason := why_unusable(str(PREFECT_API_URL.value()))) is not None:
        raise ConfigError(
            f"{_name(folder)} was trained by the flow run {flow_run_id}, and the API cannot be used ({reason}): start "
            f"it, or go on in this terminal: danling resume {_name(folder)} --here"
        )
    with get_client(sync_client=True) as client:
        try:
            flow_run = client.read_flow_run(UUID(flow_run_id))
        except (ObjectNotFound, ValueError):
            return False
        if flow_run.deployment_id is None:
            return False
        watch = OwnerWatch(folder.lease_parent_url)
        while watch.look() == "at work" or not _has_settled(flow_run):
            if flow_run.state is not None and not flow_run.state.is_final() and watch.look() == "at work":
                raise ConfigError(f"flow run {flow_run.name} has the run in work: it needs no resume")
            time.sleep(_POLL_SECONDS)
            flow_run = client.read_flow_run(UUID(flow_run_id))
        message = f"resumed by danling resume, pid {os.getpid()} on {socket.gethostname()}"
        client.set_flow_run_state(
            UUID(flow_run_id), Scheduled(name="AwaitingRetry", message=message), force=True
        )
    say(
        f"{_name(folder)}: flow run {flow_run.name} ({flow_run_id}) is run again by the worker of its deployment"
    )
    return True


def _has_settled(flow_run: Any) -> bool:
    """Return whether a flow run has ended, and so long ago that nobody reports its end once more."""
    state = flow_run.state
    if state is None or not state.is_final():
        return False
    age = (datetime.now(UTC) - state.timestamp).total_seconds()
    return age > _SETTLED_AFTER_SECONDS or not (state.is_crashed() or state.is_failed())


def examine(root: str) -> int:
    """Print what every unfinished run of a root is doing, and set the flow runs of the dead to Crashed."""
    found: dict[str, list[str]] = {"at work": [], "dead": [], "silent": []}
    for folder, status in list_runs(root):
        owner = current_owner(folder.lease_parent_url)
        if owner is None or (status is not None and status.is_complete and is_dead(owner)):
            continue
        kind, line = _diagnosis(folder, status, owner)
        found[kind].append(line)
    for kind, lines in found.items():
        for line in lines:
            say(f"{kind:8} {line}")
    if not any(found.values()):
        say(f"no run under {root} is at work, and none was left by a process that is gone")
    return DONE


def _diagnosis(folder: RunFolder, status: Status | None, owner: Owner) -> tuple[str, str]:
    what = f"{_name(folder)}: {owner}"
    if is_dead(owner):
        crashed = _crash_all(owner)
        shown = f"; {len(crashed)} flow run(s) set to Crashed: {', '.join(crashed)}" if crashed else ""
        return "dead", f"{what}{shown}; danling resume {_name(folder)} goes on"
    age = time.time() - owner.beat_at
    if age > STALE_AFTER_SECONDS:
        return "silent", f"{what}: no beat for {format_duration(age)}, by the clock of this machine"
    return "at work", f"{what}: {'' if status is None else f'{status.progress:.0%}'}"


def _crash_all(owner: Owner) -> list[str]:
    """Set the flow runs of a dead process to Crashed, where an API is configured; return those that were not ended."""
    from prefect.settings import PREFECT_API_URL

    if not owner.flow_runs or PREFECT_API_URL.value() is None:
        return []
    from flows.server import why_unusable
    from tasks.artifacts import crash

    if (reason := why_unusable(str(PREFECT_API_URL.value()))) is not None:
        logger.warning("the flow runs of the dead stay as they are: the API cannot be used (%s)", reason)
        return []
    return [each for each in owner.flow_runs if crash(each, f"{owner} is gone (found by danling doctor)")]
