"""`danling pull`, `danling push` and `danling prune`: moving runs between stores, and making room."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flows.cli_text import say

if TYPE_CHECKING:
    from danling_core.runs.folder import RunFolder
    from danling_core.runs.lease_owner import Owner
    from danling_core.tools.transfer import OnProgress


def pull_run(root: str, run: str, to: str) -> int:
    """Copy one run to a local root, and check it."""
    from danling_core import storage
    from danling_core.errors import ConfigError
    from danling_core.runs.finding import resolve

    if not storage.is_local(to):
        raise ConfigError(f"DIR is {to!r}, and `pull` copies to a local folder: see `danling push`")
    _copy(resolve(root, run), storage.local_path(to))
    return 0


def push_runs(url: str, to: str) -> int:
    """Copy the runs of a folder to another root, and check them; 1 if one of several could not be copied."""
    from danling_core.errors import DanLingError
    from danling_core.tools.transfer import dead_owners

    folders, failures = _runs_in(url), 0
    for folder, dead_owner in zip(folders, dead_owners(folders), strict=True):
        try:
            _copy(folder, to, dead_owner)
        except DanLingError as error:
            if len(folders) == 1:
                raise
            failures += 1
            say(f"{folder.url}: left alone: {error}")
    return 1 if failures else 0


def prune_runs(root: str, keep_best: bool, keep_last: int | None, is_confirmed: bool) -> int:
    """Print what may be deleted, and delete it with --yes; 1 if something could not be deleted."""
    from danling_core.errors import ConfigError
    from danling_core.tools.prune import carry_out, plan

    if not keep_best and keep_last is None:
        raise ConfigError("say what is to stay: --keep-best, --keep-last K, or both")
    if keep_last is not None and keep_last < 1:
        raise ConfigError(f"--keep-last is {keep_last}, and the newest checkpoint always stays: 1 or more")
    found = plan(root, keep_best=keep_best, keep_last=keep_last or 1)
    done = carry_out(found) if is_confirmed else found
    failures = sum(after.reason != before.reason for before, after in zip(found, done, strict=True))
    count = size = 0
    for each in done:
        if each.reason is not None:
            say(f"{each.folder.url}: left alone: {each.reason}")
            continue
        names = ", ".join(record.name for record in each.records)
        say(f"{each.folder.url}: {names} ({_bytes(each.size)}); {each.kept} stay")
        count, size = count + len(each.records), size + each.size
    what = "deleted" if is_confirmed else "would be deleted; --yes deletes them"
    say(f"{count} checkpoints, {_bytes(size)}: {what}")
    return 1 if failures else 0


def _runs_in(url: str) -> list[RunFolder]:
    from danling_core.runs.finding import list_runs, resolve
    from danling_core.runs.folder import RunFolder

    folder = RunFolder(url.rstrip("/") or "/")
    if folder.holds_run():
        return [folder]
    return [found for found, _ in list_runs(url)] or [resolve(url, url)]


def _copy(folder: RunFolder, root: str, dead_owner: Owner | None = None) -> None:
    from danling_core.tools.transfer import copy_run

    with _bar(folder.url) as progress:
        done = copy_run(folder, root, progress, dead_owner=dead_owner)
    say(f"{done.target.url}: {done.files} files, {_bytes(done.size)}, checked ({_bytes(done.copied)} moved)")


@contextlib.contextmanager
def _bar(title: str) -> Iterator[OnProgress]:
    """Show a progress bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, lock = bar.add_task(title, total=None), threading.Lock()

        def tell(done: int, total: int) -> None:
            with lock:
                bar.update(task, completed=done, total=total)

        yield tell


def _bytes(count: int) -> str:
    value, units = float(count), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while value >= 1000 and (larger := next(units, None)):
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}" if unit != "B" else f"{count} B"
