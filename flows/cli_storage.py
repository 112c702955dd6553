"""`danling pull`, `danling push` and `danling prune`: moving runs between stores, and making room."""

from __future__ import annotations

import argparse
import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flows.cli_parsers import add_command, add_endpoint, add_run

if TYPE_CHECKING:
    from danling_core.runs.folder import RunFolder
    from danling_core.runs.lease_owner import Owner
    from danling_core.tools.transfer import Progress

_PULL = """\
examples:
  danling pull digits-cnn-baseline experiments --root s3://bucket/experiments
  danling pull s3://bucket/experiments/digits-cnn-baseline-0123456789abcdef experiments

The run comes to DIR/{name}-{id}/{timestamp}, so DIR is a project root: `danling runs DIR` lists it. Called
again after an interruption it goes on where it stopped.
"""
_PUSH = """\
examples:
  danling push experiments/digits-cnn-baseline-0123456789abcdef s3://bucket/experiments
  danling push experiments gs://bucket/experiments          every run under a root
"""
_PRUNE = """\
examples:
  danling prune s3://bucket/experiments --keep-best         what would be deleted, and how much
  danling prune s3://bucket/experiments --keep-best --yes   delete it
  danling prune experiments --keep-last 2                   best checkpoints may go, too

The newest checkpoint of every run stays, and runs that are being trained are left alone. The epoch-N checkpoints
that save_interval keeps go like all others: with them goes what `danling reproduce RUN --epoch N` begins from.
"""


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the three commands, each with its function as `command`."""
    pull = add_command(commands, "pull", "copy a run from a store to a local folder", _PULL)
    add_run(pull)
    pull.add_argument("to", metavar="DIR", help="local project root to put it under")
    pull.set_defaults(command=run_pull)
    push = add_command(commands, "push", "copy a local run, or all under a root, to a store", _PUSH)
    push.add_argument("folder", metavar="DIR", help="a run's folder, or a project root")
    push.add_argument("to", metavar="URL", help="project root to put it under: s3://bucket/experiments")
    add_endpoint(push)
    push.set_defaults(command=run_push)
    prune = add_command(commands, "prune", "delete checkpoints that are not needed, epoch-N too", _PRUNE)
    prune.add_argument("root", metavar="ROOT", help="project root, local or remote")
    prune.add_argument("--keep-best", action="store_true", help="keep each run's best checkpoint")
    prune.add_argument("--keep-last", type=int, metavar="K", help="keep the newest K of each run; default: 1")
    prune.add_argument("--yes", action="store_true", help="delete; without it nothing is")
    add_endpoint(prune)
    prune.set_defaults(command=run_prune)


def run_pull(arguments: argparse.Namespace) -> int:
    """Copy one run to a local root, and check it."""
    from danling_core import storage
    from danling_core.errors import ConfigError
    from danling_core.runs.folder import resolve

    if not storage.is_local(arguments.to):
        raise ConfigError(f"DIR is {arguments.to!r}, and `pull` copies to a local folder: see `danling push`")
    _copy(resolve(arguments.root, arguments.run), storage.local_path(arguments.to))
    return 0


def run_push(arguments: argparse.Namespace) -> int:
    """Copy the runs of a folder to another root, and check them; 1 if one of several could not be copied."""
    from danling_core.errors import DanLingError
    from danling_core.tools.transfer import dead_owners

    folders, failures = _runs_in(arguments.folder), 0
    for folder, dead_owner in zip(folders, dead_owners(folders), strict=True):
        try:
            _copy(folder, arguments.to, dead_owner)
        except DanLingError as error:
            if len(folders) == 1:
                raise
            failures += 1
            print(f"{folder.url}: left alone: {error}")
    return 1 if failures else 0


def run_prune(arguments: argparse.Namespace) -> int:
    """Print what may be deleted, and delete it with --yes; 1 if something could not be deleted."""
    from danling_core.errors import ConfigError
    from danling_core.tools.prune import carry_out, plan

    if not arguments.keep_best and arguments.keep_last is None:
        raise ConfigError("say what is to stay: --keep-best, --keep-last K, or both")
    if arguments.keep_last is not None and arguments.keep_last < 1:
        raise ConfigError(
            f"--keep-last is {arguments.keep_last}, and the newest checkpoint always stays: 1 or more"
        )
    found = plan(arguments.root, keep_best=arguments.keep_best, keep_last=arguments.keep_last or 1)
    done = carry_out(found) if arguments.yes else found
    failures = sum(after.reason != before.reason for before, after in zip(found, done, strict=True))
    count = size = 0
    for each in done:
        if each.reason is not None:
            print(f"{each.folder.url}: left alone: {each.reason}")
            continue
        names = ", ".join(record.name for record in each.records)
        print(f"{each.folder.url}: {names} ({_bytes(each.size)}); {each.kept} stay")
        count, size = count + len(each.records), size + each.size
    what = "deleted" if arguments.yes else "would be deleted; --yes deletes them"
    print(f"{count} checkpoints, {_bytes(size)}: {what}")
    return 1 if failures else 0


def _runs_in(url: str) -> list[RunFolder]:
    from danling_core.runs.folder import RunFolder, list_runs, resolve

    folder = RunFolder(url.rstrip("/") or "/")
    if folder.holds_run():
        return [folder]
    return [found for found, _ in list_runs(url)] or [resolve(url, url)]


def _copy(folder: RunFolder, root: str, dead_owner: Owner | None = None) -> None:
    from danling_core.tools.transfer import copy_run

    with _bar(folder.url) as progress:
        done = copy_run(folder, root, progress, dead_owner=dead_owner)
    print(
        f"{done.target.url}: {done.files} files, {_bytes(done.size)}, checked ({_bytes(done.copied)} moved)"
    )


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Progress]:
    """A progress bar on stderr, where that is a terminal."""
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
