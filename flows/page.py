"""The pages that a run shows in the orchestrator: what came out, where its files are, and the commands for more."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from danling_core import storage
from danling_core.errors import DanLingError
from danling_core.runs.folder import RunFolder
from danling_core.storage.json_safe import from_json_safe
from flows.leaderboard import cell, flat_metrics
from flows.outcome import RunOutcome, describe

_MOST_ROWS = 10_000
_CONSOLES = {
    "s3": "https://s3.console.aws.amazon.com/s3/buckets/{bucket}?prefix={path}/",
    "gs": "https://console.cloud.google.com/storage/browser/{bucket}/{path}",
}


def run_page(outcome: RunOutcome, code: str, picture: str | None = None) -> str:
    """Return the Markdown page of a run of the `code`, with the `picture` of its curves where there is one."""
    known = {**outcome.dict(), "evaluation": None, **flat_metrics(outcome.evaluation)}
    shown = {name: value for name, value in known.items() if value is not None and value is not False}
    rows = "\n".join(f"| {name} | {cell(value)} |" for name, value in shown.items())
    parts = [f"# {outcome.name}", describe(outcome), f"code `{code}`"]
    if outcome.folder is not None:
        parts += [_place(outcome.folder), _commands(outcome)]
    if picture is not None:
        parts.append(picture)
    return "\n\n".join([*parts, f"| | |\n|-|-|\n{rows}\n"])


def epoch_rows(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the results of every epoch of a run, one mapping each, the newest last; none where they cannot be read."""
    try:
        results = storage.read_json_object(folder.results_url).get("results")
    except DanLingError:
        return []
    if not isinstance(results, Mapping):
        return []
    rows = [
        {"epoch": int(index), **flat_metrics(from_json_safe(result))} for index, result in results.items()
    ]
    return sorted(rows, key=lambda row: row["epoch"])[-_MOST_ROWS:]


def _place(url: str) -> str:
    """Return where a folder is: a link to its store's console, or a path as text, which no browser can open."""
    scheme = storage.scheme(url)
    if scheme not in _CONSOLES:
        return f"`{url}`"
    bucket, _, path = url.partition("://")[2].partition("/")
    return f"[{url}]({_CONSOLES[scheme].format(bucket=bucket, path=quote(path))})"


def _commands(outcome: RunOutcome) -> str:
    folder = shlex.quote(str(outcome.folder))
    lines = [f"danling show {folder}"]
    if outcome.status == "complete":
        lines += [f"danling verify {folder}", f"danling reproduce {folder} --from-start"]
    else:
        lines += [f"danling resume {folder}"]
    return "\n".join(["```sh", *lines, "```"])
