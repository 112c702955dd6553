"""Finds or creates a run under its lease: the same for the driver, a torchrun worker and a runner alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from danling_core import storage
from danling_core.config import storage_block
from danling_core.errors import ConfigError, NotFound, StorageError, StoreUnavailable
from danling_core.identity.ids import new_timestamp
from danling_core.mirror.layout import STAGING
from danling_core.mirror.pull import pull, pull_checkpoints, pull_small_files
from danling_core.runs import metadata
from danling_core.runs.finding import find_folders, parent_url
from danling_core.runs.folder import RunFolder, Status
from danling_core.runs.lease import STALE_AFTER_SECONDS, Lease
from danling_core.session.other_code import tell_of_hidden_imports, tell_of_other_code
from danling_core.session.scratch import scratch_folder, sign

logger = logging.getLogger("danling")

if TYPE_CHECKING:
    from danling_core.config import Config
    from danling_core.identity.ids import Identity


@dataclass(frozen=True)
class OpenedRun:
    """A run that may be written (`lease` is held), or a complete one (`complete` is set, `lease` is None).

    Args:
        folder: where the run lives, local or remote.
        lease: held by the caller, who beats and releases it.
        complete: the completion record of a run that has nothing left to do.
        generation: of the lease; 0 without one.
        work_dir: the local folder to write into; the folder itself where it is local.
        is_new: it was created just now; otherwise it is resumed.
    """

    folder: RunFolder
    lease: Lease | None
    complete: Status | None
    generation: int
    work_dir: str
    is_new: bool

    @property
    def remote_url(self) -> str | None:
        """URL to which the mirror uploads `work_dir`; None for a local run."""
        return None if storage.is_local(self.folder.url) else self.folder.url


def open_run(
    config: Config,
    identity: Identity,
    *,
    fresh: bool = False,
    source_file: str | None = None,
    timestamp: str | None = None,
    stale_after_seconds: float = STALE_AFTER_SECONDS,
    wait_seconds: float = 0.0,
    flow_runs: Sequence[str] = (),
) -> OpenedRun:
    """Return the run that this config and this code mean: complete, resumed in place, or new.

    Called by one process of a run (the driver, or rank 0). For a remote root, what a resume needs is brought
    to the local work folder. The caller uses the run's `storage_options` for what follows: other runs of this
    process may have others.

    Args:
        config: the full config.
        identity: its identity.
        fresh: begin anew, under a new timestamp, whatever is there.
        source_file: the runner's file, whose git repository goes into the metadata.
        timestamp: of the folder to make, where there is no run yet.
        stale_after_seconds: without a beat for so long, another machine's owner is taken over.
        wait_seconds: how long to wait for a living owner to finish.
        flow_runs: ids under which an orchestrator shows the work of this process, the innermost first. The outermost
            one begins anew once: a retry of it goes on with what it made.

    Raises:
        RunBusy: another living process owns the run.
        ConfigError: a `checkpoint_dir` for a remote run; a `storage_block` that was not loaded; `fresh` together
            with `dir`, where a run is already.
        StorageError: the store refuses or is away.
    """
    storage_block.check_loaded(config)
    _check_places(config)
    with storage.using(config.storage_options):
        fresh = fresh and not _is_made_by(newest_folder(config, identity), flow_runs)
        if not fresh and (done := newest_complete(config, identity)):
            return done
        lease = _acquire(config, identity, stale_after_seconds, wait_seconds, flow_runs)
        try:
            if not fresh and (done := newest_complete(config, identity)):  # completed while we waited
                lease.release()
                return done
            with lease.beating():
                return _open_under(lease, config, identity, fresh, source_file, timestamp)
        except BaseException:
            lease.release()
            raise


def _is_made_by(folder: RunFolder | None, flow_runs: Sequence[str]) -> bool:
    """Return whether a folder was made for the outermost of these flow runs, by a try of before."""
    if folder is None or not flow_runs:
        return False
    attempts = (_known_metadata(folder) or {}).get("attempts") or [{}]
    return isinstance(attempts[0], dict) and attempts[0].get("flow_run") == flow_runs[-1]


def _acquire(
    config: Config,
    identity: Identity,
    stale_after_seconds: float,
    wait_seconds: float,
    flow_runs: Sequence[str],
) -> Lease:
    """Acquire the run's lease; that of its other name, where one has begun under that since we looked."""
    while True:
        parent = lease_parent_url(config, identity)
        lease = Lease.acquire(
            parent,
            f"{identity.name}-{identity.id} ({metadata.user_name()})",
            stale_after_seconds=stale_after_seconds,
            wait_seconds=wait_seconds,
            flow_runs=flow_runs,
        )
        if lease_parent_url(config, identity) == parent:
            return lease
        lease.release()


def bring_checkpoints(url: str, work_dir: str, config: Config) -> None:
    """Fetch the newest and the best checkpoint of a complete remote run, for whoever wants its weights here: its mirror
    deletes them when it is done. Of a run that is resumed they are here already.

    Args:
        url: the run's folder on the store.
        work_dir: its local one.
        config: of the run.
    """
    name = config.checkpoint_dir_name
    local = os.path.join(work_dir, name)
    pull_checkpoints(storage.join(url, name), local, os.path.join(work_dir, STAGING))


def work_dir(config: Config, folder: RunFolder) -> str:
    """Return the local folder that a run is written into: its own where it is local, else one in the scratch folder."""
    if storage.is_local(folder.url):
        return storage.local_path(folder.url)
    return scratch_folder(folder.url, config.scratch)


def _check_places(config: Config) -> None:
    place = config.project_root if config.dir is None else config.dir
    if config.checkpoint_dir is not None and not storage.is_local(place):
        raise ConfigError(
            f"checkpoint_dir {config.checkpoint_dir!r} cannot be given for a run at {place}: its checkpoints are "
            "brought into its folder there, under one lease; leave it out, or name the folder by "
            "checkpoint_dir_name"
        )


def lease_parent_url(config: Config, identity: Identity) -> str:
    """Return the folder of the leases of the run that this config and this code mean."""
    if config.dir is not None:
        return RunFolder(_absolute(config.dir)).lease_parent_url
    return parent_url(_absolute(config.project_root), identity.name, identity.id)


def newest_folder(config: Config, identity: Identity) -> RunFolder | None:
    """Return the newest folder of the run that this config and this code mean; None where there is none.

    A folder that somebody else made, by writing a file into `runner.dir`, is no run.
    """
    if config.dir is not None:
        folders = [RunFolder(_absolute(config.dir))]
    else:
        folders = find_folders(_absolute(config.project_root), identity.name, identity.id)
    return next((folder for folder in folders if folder.is_begun()), None)


def newest_complete(config: Config, identity: Identity) -> OpenedRun | None:
    """Return the run that this config and this code mean, where its newest attempt is complete; nothing is claimed.

    Raises:
        ConfigError: `dir` holds another run.
        StorageError: the store refuses or is away.
    """
    folder = newest_folder(config, identity)
    status = folder.find_status() if folder else None
    if folder is None or status is None or not status.is_complete:
        return None
    _check_same_run(folder, identity)
    local = work_dir(config, folder)
    if not storage.is_local(folder.url):
        pull_small_files(folder, local)
    return OpenedRun(folder, None, status, 0, local, is_new=False)


def _open_under(
    lease: Lease,
    config: Config,
    identity: Identity,
    fresh: bool,
    source_file: str | None,
    timestamp: str | None,
) -> OpenedRun:
    newest = newest_folder(config, identity)
    if fresh and newest is not None and config.dir is not None:
        raise ConfigError(
            f"dir {config.dir!r} holds a run already; to begin anew name another one, or remove it"
        )
    if newest is None or fresh:
        # later than what a silent owner may have chosen, and may still make
        folder = _new_folder(config, identity, newest, None if lease.is_taken_over else timestamp)
        if newest is None and config.dir is None:
            tell_of_other_code(_absolute(config.project_root), config, identity, source_file)
            if config.experiment_id is None:
                tell_of_hidden_imports(source_file)
        _create(folder, lease, config, identity, source_file)
    else:
        folder = newest
        _resume(folder, lease, config, identity, source_file)
    local = work_dir(config, folder)
    if not storage.is_local(folder.url):
        sign(
            local, lease.generation
        )  # before, for who writes there still, and after, since the folder may be emptied
        pull(folder, local, config.checkpoint_dir_name)
        sign(local, lease.generation)
    return OpenedRun(folder, lease, None, lease.generation, local, is_new=folder is not newest)


def _new_folder(
    config: Config, identity: Identity, newest: RunFolder | None, timestamp: str | None
) -> RunFolder:
    if config.dir is not None:
        return RunFolder(_absolute(config.dir))
    root, now = _absolute(config.project_root), datetime.now(UTC)
    named = next(iter(find_folders(root, identity.name, identity.id)), None)
    if timestamp is not None and newest is None and (named is None or named.timestamp <= timestamp):
        return RunFolder(storage.join(parent_url(root, identity.name, identity.id), timestamp))
    if named is not None:  # never sort before a run that a faster clock has named
        last = datetime.strptime(named.timestamp, "%Y%m%d-%H%M%S-%f").replace(tzinfo=UTC)
        now = max(now, last + timedelta(microseconds=1))
    return RunFolder(storage.join(parent_url(root, identity.name, identity.id), new_timestamp(now)))


def _create(
    folder: RunFolder, lease: Lease, config: Config, identity: Identity, source_file: str | None
) -> None:
    code = os.path.dirname(os.path.abspath(source_file)) if source_file else None
    facts = {
        "name": identity.name,
        "id": identity.id,
        "uuid": str(identity.uuid),
        "run_id": identity.run_id,
        "experiment_id": identity.experiment_id,
        **metadata.collect(code, group=config.group),
    }
    entry = _attempt(lease, config)
    storage.write_json(folder.metadata_url, metadata.with_attempt(facts, entry), guard=lease.check)
    if config.checkpoint_dir is not None:  # which prune and verify look for from other folders
        config = config.replace(checkpoint_dir=_absolute(config.checkpoint_dir))
    storage.write_bytes(folder.config_url, config.yamls().encode(), guard=lease.check)


def _resume(
    folder: RunFolder, lease: Lease, config: Config, identity: Identity, source_file: str | None
) -> None:
    _check_same_run(folder, identity)
    known = _known_metadata(folder)
    if known is None or not _has_config(folder):  # damaged, or whoever created it died half-way
        _create(folder, lease, config, identity, source_file)
        return
    entry = _attempt(lease, config)
    storage.write_json(folder.metadata_url, metadata.with_attempt(known, entry), guard=lease.check)


def _has_config(folder: RunFolder) -> bool:
    try:
        folder.read_config()
    except NotFound:
        return False
    except ConfigError as error:
        logger.warning("%s: it is written anew", error)
        return False
    return True


def _known_metadata(folder: RunFolder) -> dict[str, Any] | None:
    """Return the metadata; None, with a warning, where the file is damaged."""
    try:
        return metadata.read(folder.metadata_url)
    except NotFound:
        return {}
    except StoreUnavailable:
        raise
    except StorageError as error:
        logger.warning("%s: it is written anew", error)
        return None


def _attempt(lease: Lease, config: Config) -> dict[str, Any]:
    facts: dict[str, Any] = {"nproc_per_node": config.nproc_per_node, "nnodes": config.nnodes}
    if lease.flow_runs:
        facts["flow_run"] = lease.flow_runs[-1]
    return metadata.attempt_entry(generation=lease.generation, **facts)


def _check_same_run(folder: RunFolder, identity: Identity) -> None:
    """Only a folder that was named by hand (`dir`) can hold another run."""
    found = (_known_metadata(folder) or {}).get("run_id")
    if found not in (None, identity.run_id):
        raise ConfigError(
            f"{folder.url} holds run {found}; this code and config are {identity.run_id}: name another dir"
        )


def _absolute(url: str) -> str:
    return storage.local_path(url) if storage.is_local(url) else url.rstrip("/")
