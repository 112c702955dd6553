"""A run of the same config that other code has made: said when a new one begins beside it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from danling_core import storage
from danling_core.config import Config
from danling_core.errors import ConfigError, DanLingError
from danling_core.identity.code_state import git_output
from danling_core.identity.ids import Identity, is_named_by_file
from danling_core.identity.imports import hidden_imports
from danling_core.runs import metadata
from danling_core.runs.finding import NAME_AND_ID, begun_folders
from danling_core.runs.folder import RunFolder

logger = logging.getLogger("danling")

_LOOKED_AT = 8


def tell_of_other_code(root_url: str, config: Config, identity: Identity, source_file: str | None) -> None:
    """Say in one line that there is a run of this config under another code id, what differs, and how to resume it.

    Args:
        root_url: the project root.
        config: of the run that is about to begin.
        identity: of that run.
        source_file: where its runner is defined.
    """
    try:
        found = _newest(root_url, config, identity)
    except DanLingError as error:  # whatever lies there, this run can begin
        logger.debug("%s", error)
        return
    if found is None:
        return
    folder, experiment_id = found
    status = folder.find_status()
    logger.warning(
        "a run of the same config (%s, in %s) was made by other code%s: this one begins anew; to go on with that one, "
        "%s",
        *("unknown" if status is None else status.status, folder.url),
        *(_difference(source_file, experiment_id), _advice(config, experiment_id)),
    )


def _advice(config: Config, experiment_id: str) -> str:
    """Return what makes this config mean the other run."""
    if is_named_by_file(config):  # whose content belongs to the run's id
        commit, _, difference = experiment_id.partition("-")
        return f"put its code back: commit {commit[:12]}{' and what was changed in it' if difference else ''}"
    return f"give experiment_id={experiment_id}"


def tell_of_hidden_imports(source_file: str | None) -> None:
    """Say in one line which imports are no part of a new run's id, since their names are made at run time."""
    if source_file is None or not os.path.isfile(source_file):
        return
    hidden = hidden_imports(Path(source_file).resolve())
    if hidden:
        logger.warning(
            "%s: what is imported there by a name that is made at run time is no part of the run's id, where git does "
            "not track it: after a change of it give --fresh, or state experiment_id",
            ", ".join(hidden[:3]) + (", ..." if len(hidden) > 3 else ""),
        )


def _newest(root_url: str, config: Config, identity: Identity) -> tuple[RunFolder, str] | None:
    matches = [match for name in storage.list_names(root_url) if (match := NAME_AND_ID.fullmatch(name))]
    others = [m["id"] for m in matches if m["name"] == identity.name and m["id"] != identity.id]
    folders = [folder for id in others for folder in begun_folders(root_url, identity.name, id)[:1]]
    for folder in sorted(folders, key=lambda each: each.timestamp, reverse=True)[:_LOOKED_AT]:
        try:
            is_same = _without_code(folder.read_config()) == _without_code(config)
            known = metadata.read(folder.metadata_url).get("experiment_id")
        except DanLingError as error:
            logger.debug("%s", error)
            continue
        if is_same and isinstance(known, str) and known != identity.experiment_id:
            return folder, known
    return None


def _without_code(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config.canonical().items() if key != "runner"}


def _difference(source_file: str | None, experiment_id: str) -> str:
    """Return how the code differs from that commit, as `git diff --shortstat` says; nothing where git cannot tell."""
    if source_file is None:
        return ""
    try:
        answer = git_output(
            Path(os.path.dirname(os.path.abspath(source_file))),
            "diff",
            "--shortstat",
            experiment_id[:40],
            "--",
        )
    except ConfigError:
        return ""
    text = "" if answer is None else answer.decode(errors="replace").strip()
    return f" ({text} since its commit)" if text else ""
