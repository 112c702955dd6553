"""Which run owns the files that a run's folder reaches through links, or by its `checkpoint_dir`."""

from __future__ import annotations

import os

from danling_core import storage
from danling_core.runs.folder import LEASE, RunFolder


def another_run(folder: RunFolder, checkpoints_url: str) -> str | None:
    """Return the run under whose lease this folder or its checkpoints are, where that is another one.

    Args:
        folder: of the run.
        checkpoints_url: where its checkpoints are, by its config.
    """
    here = _real(folder.url)
    if storage.parent(here) != _real(storage.parent(folder.url)) and _has_lease(here):
        return here
    place = RunFolder(storage.parent(_real(checkpoints_url)))
    return place.url if place.url != here and place.holds_run() else None


def _has_lease(url: str) -> bool:
    return LEASE in storage.list_names(RunFolder(url).lease_parent_url)


def _real(url: str) -> str:
    """Return a local path without links; a URL as it is."""
    return os.path.realpath(storage.local_path(url)) if storage.is_local(url) else url.rstrip("/")
