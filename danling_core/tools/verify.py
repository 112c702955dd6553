"""Verify a run's folder: every committed checkpoint by its bytes, every other file by what the rest says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from danling_core import storage
from danling_core.checkpoints.record import Record
from danling_core.checkpoints.store import CheckpointStore
from danling_core.config import Config
from danling_core.errors import CheckpointError, DanLingError, NotFound, StorageError, StoreUnavailable
from danling_core.results.history import Results
from danling_core.runs import metadata
from danling_core.runs.folder import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    EVENTS,
    LATEST,
    METADATA,
    RESULTS,
    STATUS,
    RunFolder,
    Status,
    checkpoints_url,
    read_log,
)
from danling_core.storage.json_safe import from_json_safe
from danling_core.writers.protocol import told_end

Value = TypeVar("Value")


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    Args:
        severity: "bad" where something is damaged or contradicts the rest; "odd" for what a crash may leave
            behind and a resume puts right.
        where: the file, or the checkpoint.
        what: one line.
    """

    severity: Literal["bad", "odd"]
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.what}"


@dataclass
class VerifyReport:
    """Result of `verify`: what it read, and what it found."""

    url: str
    findings: list[Finding] = field(default_factory=list)
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    events: int = 0
    unchecked: list[str] = field(default_factory=list)
    """Files that nothing else says anything about, such as logs: they may be changed without a finding."""
    not_bitwise: str | None = None
    """Why the run's bits are not those of one that was never interrupted; None where they are."""

    @property
    def is_good(self) -> bool:
        """Return whether nothing is damaged, and no file contradicts another."""
        return all(finding.severity != "bad" for finding in self.findings)

    def bad(self, where: str, what: str) -> None:
        self.findings.append(Finding("bad", where, what))

    def odd(self, where: str, what: str) -> None:
        self.findings.append(Finding("odd", where, what))


def verify(run_url: str) -> VerifyReport:
    """Read everything in a run's folder that is not a log, and compare. Nothing is changed.

    A run that is being trained may be verified too: what is half done there counts as odd at most.

    Raises:
        NotFound: there is no run at `run_url`.
        StorageError: the store refuses or is away.
    """
    folder = RunFolder(run_url.rstrip("/"))
    if not folder.holds_run():
        raise NotFound(f"there is no run at {run_url}: neither config.yaml nor status.json lies there")
    report = VerifyReport(folder.url)
    config = _read(report, folder.config_url, lambda url: folder.read_config())
    _read(report, folder.metadata_url, metadata.read)
    status = _read(report, folder.status_url, lambda url: folder.read_status())
    store = CheckpointStore(checkpoints_url(folder, config))
    newest = _verify_checkpoints(report, store)
    results = _verify_results(report, folder, status)
    if status is not None:
        _verify_events(report, folder, status, results)
        if not status.bitwise:
            report.not_bitwise = status.not_bitwise or "it went on with another number of ranks once"
    report.unchecked = _unchecked(folder, store, config)
    if status is not None and status.is_complete:
        _verify_completion(report, folder, status, newest, results, config)
    return report


def _unchecked(folder: RunFolder, store: CheckpointStore, config: Config | None) -> list[str]:
    checked = {CONFIG, METADATA, STATUS, RESULTS, LATEST, BEST, EVALUATION, EVENTS}
    inside = CHECKPOINTS if config is None else config.checkpoint_dir_name
    payloads = {
        f"{inside}/data/{record.name}/{file.name}" for record in store.records() for file in record.files
    }
    return [
        path
        for path in (entry.path for entry in storage.list_tree(folder.url))
        if path not in checked | payloads
        and not (path.startswith(f"{inside}/") and path.endswith(".json"))
        and not path.startswith(f"{EVENTS.partition('.')[0]}/")
    ]


def _read(report: VerifyReport, url: str, read: Callable[[str], Value | None]) -> Value | None:
    """Return what `read` finds at a URL; None, and a finding, where it is absent or damaged."""
    where = storage.base_name(url)
    try:
        found = read(url)
    except NotFound:
        found = None
    except StoreUnavailable:
        raise
    except DanLingError as error:
        report.bad(where, f"cannot be read: {error}")
        return None
    if found is None:
        report.odd(where, "is not there")
    return found


# checkpoints


def _verify_checkpoints(report: VerifyReport, store: CheckpointStore) -> Record | None:
    """Every payload against its record; returns the newest record."""
    records, damaged = store.survey()
    for each in damaged:
        report.bad(f"checkpoint {each.name}", each.reason)
    for record in records:
        try:
            store.verify(record)
        except CheckpointError as error:
            if record in store.records():  # not one that a living run pruned meanwhile
                report.bad(f"checkpoint {record.name}", str(error))
        else:
            report.checkpoints += 1
            report.checkpoint_bytes += record.size
    for each in store.damaged_pointers():
        report.bad(f"{storage.base_name(store.url)}/{each.name}.json", each.reason)
    return records[0] if records else None


# results and events


def _verify_results(report: VerifyReport, folder: RunFolder, status: Status | None) -> Results | None:
    document = _read(report, folder.results_url, storage.read_json_object)
    if document is None:
        return None
    try:
        results = _results(document["results"], status)
    except (DanLingError, ValueError, KeyError, TypeError, AttributeError) as error:
        report.bad("results.json", f"holds no results: {error!r}")
        return None
    if status is not None and (document.get("name"), document.get("id")) != (status.name, status.id):
        report.bad("results.json", f"is of {document.get('name')}-{document.get('id')}")
    for url, found in ((folder.latest_url, results.latest_result), (folder.best_url, results.best_result)):
        said = _read(report, url, storage.read_json_object) if found is not None else None
        if said is not None and found is not None:
            named = {key: said[key] for key in found if key in said}
            if not same(from_json_safe(named), found):
                report.bad(storage.base_name(url), f"says {named}, results.json says {found}")
    return results


def _results(value: Mapping[str, Any], status: Status | None) -> Results:
    if status is None or status.score_name is None:
        return Results.from_json(value)
    mode: Any = status.score_mode
    return Results.from_json(value, status.score_split, status.score_name, mode)


def _verify_events(report: VerifyReport, folder: RunFolder, status: Status, results: Results | None) -> None:
    last: dict[str, Any] | None = None
    reported: dict[int, Any] = {}
    for number, event in _events(report, folder):
        report.events += 1
        last = event
        if event.get("event") != "epoch_finished":
            continue
        index, result = event["index"], from_json_safe(event["result"])
        if status.bitwise and index in reported and not same(reported[index], result):
            report.bad(f"events.jsonl:{number}", f"result {index} was repeated, and is another one")
        reported[index] = result
    for index, result in (results.history if results is not None else {}).items():
        if index not in reported:
            report.bad("results.json", f"has a result {index}, which no event reports")
        elif not same(reported[index], result):
            report.bad("results.json", f"result {index} is {result}, its event says {reported[index]}")
    if status.status != "running" and (last is None or told_end(last) != status.status):
        found = last and last.get("event")
        report.odd("events.jsonl", f"ends with {found!r}, status.json says {status.status!r}")


def _events(report: VerifyReport, folder: RunFolder) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = read_log(folder, EVENTS).split(b"\n")
    except NotFound:
        report.odd(EVENTS, "is not there")
        return
    if lines.pop():
        report.odd(EVENTS, "its last line is torn: the next resume cuts it off")
    for number, line in enumerate(lines, 1):
        try:
            event = storage.parse_json_object(line, EVENTS)
            assert isinstance(event["event"], str) and isinstance(event["attempt"], str)
            if event["event"] == "epoch_finished":
                assert isinstance(event["index"], int) and isinstance(event["result"], dict)
        except (StorageError, KeyError, AssertionError):
            report.bad(f"{EVENTS}:{number}", f"is no event: {line[:80]!r}")
        else:
            yield number, event


# the completion record


def _verify_completion(
    report: VerifyReport,
    folder: RunFolder,
    status: Status,
    newest: Record | None,
    results: Results | None,
    config: Config | None,
) -> None:
    if newest is None:
        report.bad("status.json", "says complete, and there is no checkpoint")
    elif config is not None and "train" in config.stages:
        counted = {"iters": status.iters, "steps": status.steps, "epochs": status.epochs}
        if newest.progress != counted:
            report.bad("status.json", f"says {counted}, checkpoint {newest.name} says {newest.progress}")
    if results is not None:
        said = (status.best_index, status.best_score, status.latest_score)
        found = (results.best_index, results.best_score, results.latest_score)
        if not same(said, found):
            report.bad("status.json", f"best index, best and latest score {said}; of results.json {found}")
    if status.evaluation is not None:
        document = _read(report, folder.evaluation_url, storage.read_json_object)
        if document is not None and not same(from_json_safe(document.get("result")), status.evaluation):
            report.bad("evaluation.json", f"says {document.get('result')}, status.json {status.evaluation}")


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, as JSON goes: NaN is NaN, a text "NaN" too, and tuples are lists."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (a != a and b != b)
