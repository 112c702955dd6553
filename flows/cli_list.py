"""`danling runs` and `danling show`: read run folders, without Prefect and without torch."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from typing import Any

from danling_core import storage
from danling_core.checkpoints.record import Record
from danling_core.checkpoints.store import CheckpointStore
from danling_core.config import documents
from danling_core.errors import NotFound
from danling_core.results.formatting import format_duration, format_result
from danling_core.runs.finding import list_runs, resolve
from danling_core.runs.folder import TIMESTAMP, RunFolder, Status, find_checkpoints
from danling_core.runs.last_word import last_word
from danling_core.runs.lease import seems_held
from flows.cli_table import print_table
from flows.cli_text import say


def print_runs(root: str, group: str | None, status: str | None, as_json: bool) -> int:
    """Print a table (or JSON) of the runs under a root; their number is no error, even 0."""
    rows = [_row(folder, found) for folder, found in list_runs(root)]
    rows = [row for row in rows if group is None or row.get("group") == group]
    rows = [row for row in rows if status is None or row["status"] == status]
    rows.sort(key=lambda row: row["timestamp"], reverse=True)
    if as_json:
        say(storage.to_json(rows))
    elif rows:
        print_table(rows, hide=("seconds", "timestamp"))
    else:
        say(f"no runs under {root}")
    return 0


def print_run(root: str, run: str, as_json: bool) -> int:
    """Print status, results and files of one run."""
    folder = resolve(root, run)
    status = last_word(folder, folder.read_status())
    best, evaluation = _read(folder.best_url), _read(folder.evaluation_url)
    newest = _newest_checkpoint(folder)
    if as_json:
        committed = None if newest is None else {"step": newest.step, "at": newest.created_at}
        row = {**_row(folder, status), "checkpoint": committed, "best": best, "evaluation": evaluation}
        say(storage.to_json(row))
        return 0
    evaluated = evaluation.get("result") if isinstance(evaluation, dict) else None
    for line in (*_head(folder, status, newest), *_results("best", best), *_results("evaluation", evaluated)):
        say(line)
    names = sorted(storage.list_names(folder.url))
    say(f"\nfiles\n  {'  '.join(names)}")
    if storage.base_name(folder.config_url) not in names:
        return 0
    ranks = 1 if status is None else status.world_size
    words = [folder.config_url, *moved(folder)]
    say(f"\nby hand\n  torchrun --nproc-per-node {ranks} -m danling_core.worker {shlex.join(words)}")
    return 0


def moved(folder: RunFolder) -> list[str]:
    """Return the overrides that make a worker resume a run which was copied elsewhere than its config says."""
    root = storage.parent(storage.parent(folder.url))
    config = documents.parse_yaml(documents.read_text(folder.config_url))
    stated = config.get("project_root") if isinstance(config, dict) and not config.get("dir") else None
    if stated is None or _place(stated) == _place(root):
        return []
    return [f"project_root={root}"]


def _place(url: str) -> str:
    return storage.local_path(url) if storage.is_local(url) else url.rstrip("/")


def _row(folder: RunFolder, status: Status | None) -> dict[str, Any]:
    if status is None:
        name, stamp = _name_of(folder), folder.timestamp
        return {"name": name, "id": None, **_when(stamp), "status": "unknown", "folder": folder.url}
    return {
        "name": status.name,
        "id": status.id,
        **_when(status.timestamp),
        "group": status.group,
        "status": _status(folder, status),
        "score": status.best_score,
        "metric": None if status.score_name is None else f"{status.score_split or '?'}/{status.score_name}",
        "epochs": status.epochs,
        "time": format_duration(status.seconds),
        "seconds": round(status.seconds, 3),
        "folder": folder.url,
    }


def _when(timestamp: str) -> dict[str, str | None]:
    """When a run was created, for people (UTC, to the minute; None where its folder has a name instead) and for
    sorting."""
    if not TIMESTAMP.fullmatch(timestamp):
        return {"date": None, "timestamp": timestamp}
    day, _, time = timestamp.partition("-")
    return {"date": f"{day[:4]}-{day[4:6]}-{day[6:]} {time[:2]}:{time[2:4]}", "timestamp": timestamp}


def _status(folder: RunFolder, status: Status) -> str:
    """Return a run that says it is running, and whose owner is gone, was interrupted."""
    if status.status == "running" and not seems_held(folder.lease_parent_url):
        return "interrupted"
    return status.status


def _name_of(folder: RunFolder) -> str:
    return storage.base_name(storage.parent(folder.url))


def _newest_checkpoint(folder: RunFolder) -> Record | None:
    """Return the last one that is committed there: a run that is trained elsewhere may be ahead of its store."""
    store = CheckpointStore(find_checkpoints(folder))
    return next(iter(store.records()), None)


def _head(folder: RunFolder, status: Status | None, newest: Record | None) -> list[str]:
    row = {
        name: value
        for name, value in _row(folder, status).items()
        if value is not None and name not in ("seconds", "timestamp")
    }
    if status is not None and status.error:
        row["error"] = status.error
    if newest is not None:
        age = (datetime.now(UTC) - datetime.fromisoformat(newest.created_at)).total_seconds()
        row["checkpoint"] = f"step {newest.step}, {format_duration(age)} ago"
    width = max(len(name) for name in row)
    return [f"{name.ljust(width)}  {value}" for name, value in row.items()]


def _results(title: str, result: Any) -> list[str]:
    splits = result if isinstance(result, dict) else {}
    table = format_result({split: metrics for split, metrics in splits.items() if isinstance(metrics, dict)})
    return ["", title, *(f"  {line}" for line in table.splitlines())] if table.strip() else []


def _read(url: str) -> Any:
    try:
        return storage.read_json(url)
    except NotFound:
        return None
