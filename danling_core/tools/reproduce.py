"""Replay one epoch of a run from the checkpoint before it, elsewhere, and compare bit for bit."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from danling_core import storage
from danling_core.checkpoints.record import Record
from danling_core.checkpoints.store import CheckpointStore
from danling_core.config import Config
from danling_core.errors import CheckpointError, ConfigError, NotFound, StorageError
from danling_core.launch.client import Launcher, RunHandle
from danling_core.launch.plan import request_of
from danling_core.results.history import Results
from danling_core.runs.folder import RunFolder, Status, checkpoints_url
from danling_core.storage.json_safe import from_json_safe
from danling_core.tools.verify import same

_HINT = (
    "with save_interval=1 every epoch's checkpoint is kept (it is no part of a run's identity: resumes take "
    "it over); without, replay from the very beginning (--from-start)"
)
# Keys of a checkpoint about the making of the state, not about the state.
_NO_BITS = {("progress", "seconds"), ("config",)}


@dataclass
class ReproduceReport:
    """Result of a replay.

    Args:
        url: of the run.
        epoch: the epoch that was compared.
        start: the checkpoint that the replay began with; None for the very beginning.
        replayed: how many epochs were trained to get there.
        compared: "results", and the checkpoint of that epoch, where one is kept.
        differences: what differs, a line each.
        notes: why they may differ, though the run is sound: other code, another world size.
    """

    url: str
    epoch: int
    start: str | None = None
    replayed: int = 0
    compared: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_identical(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        start = "the beginning" if self.start is None else f"checkpoint {self.start}"
        verdict = "identical" if self.is_identical else f"{len(self.differences)} difference(s)"
        lines = [f"epoch {self.epoch}, replayed from {start}: {verdict} ({' and '.join(self.compared)})"]
        return "\n".join(
            lines + [f"  {each}" for each in self.differences] + [f"note: {each}" for each in self.notes]
        )


def reproduce(
    run_url: str,
    epoch: int,
    *,
    from_start: bool = False,
    launcher: Launcher | None = None,
    cwd: str | None = None,
) -> ReproduceReport:
    """Train `epoch` again with the run's own config, in a scratch folder, and compare results and weights.

    It starts with the newest checkpoint that is kept from before that epoch (or the beginning, for epoch 0),
    so it may have to train some epochs more. The run is only read. Loads torch.

    Args:
        run_url: a run's folder, at any URL.
        epoch: the epoch whose result is compared; it must be among the run's results.
        from_start: replay from the very beginning, whatever checkpoints there are.
        launcher: to be used; one is started, and closed, by default.
        cwd: where the runner is imported from; default: the working folder.

    Raises:
        NotFound: there is no such run, or it has no result of that epoch.
        ConfigError: no checkpoint from before that epoch is kept; the message says what to set.
        RunFailed: the replay failed.
    """
    folder = RunFolder(run_url.rstrip("/"))
    config, status, results = _read(folder, epoch)
    store = CheckpointStore(checkpoints_url(folder, config))
    report = ReproduceReport(folder.url, epoch)
    start = None if from_start else _start(store, epoch)
    report.start = None if start is None else start.name
    report.replayed = epoch + 1 - (0 if start is None else start.progress["epochs"])
    world_size = start.world_size if start is not None and start.world_size is not None else status.world_size
    if not status.bitwise:
        why = status.not_bitwise or "it went on with another number of ranks once"
        report.notes.append(f"the run is not bitwise ({why}): its epochs before that cannot agree")
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="danling-reproduce-"))
        launcher = stack.enter_context(Launcher()) if launcher is None else launcher
        replayed = _replay(launcher, config, store, start, scratch, world_size, epoch, report, cwd)
        _compare_results(report, results[epoch], replayed)
        _compare_state(report, store, CheckpointStore(os.path.join(scratch, "checkpoints")))
    return report


def _read(folder: RunFolder, epoch: int) -> tuple[Config, Status, dict[int, Any]]:
    status = folder.read_status()
    if status is None:
        raise NotFound(f"there is no run at {folder.url}: it has no status.json")
    config = folder.read_config()
    if config.epoch_end is None:
        raise ConfigError("this run is driven by steps or iters, not epochs: only epochs can be replayed")
    results = _results(folder, status, config)
    if epoch not in results:
        raise NotFound(f"the run has no result of epoch {epoch}; it has {_ranges(results)}")
    return config, status, dict(results)


def _results(folder: RunFolder, status: Status, config: Config) -> Mapping[int, Any]:
    document = storage.read_json_object(folder.results_url)
    try:
        kept = Results.from_json(
            document["results"], status.score_split, config.score_name, config.score_mode
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"{folder.results_url} holds no results: {error!r}") from error
    return kept.history


def _ranges(indices: Mapping[int, Any]) -> str:
    return f"{min(indices)} to {max(indices)}" if indices else "none"


# which checkpoints


def _is_between_epochs(store: CheckpointStore, record: Record) -> bool:
    """Return whether a checkpoint is good and was taken between epochs: not inside one, nor in its evaluation."""
    from danling_core.checkpoints.codec import load_state

    if record.info.get("inside") is not None:
        return False
    try:
        return not load_state(store, record)["epoch"]["trained"]
    except CheckpointError:
        return False


def _start(store: CheckpointStore, epoch: int) -> Record | None:
    if epoch == 0:
        return None
    records = store.records()
    for record in records:
        if record.progress.get("epochs", 0) <= epoch and _is_between_epochs(store, record):
            return record
    kept = sorted({record.progress.get("epochs", 0) for record in records})
    raise ConfigError(
        f"to replay epoch {epoch}, a checkpoint from before it is needed; those kept were taken after "
        f"{', '.join(map(str, kept)) or 'no'} epochs: {_HINT}"
    )


# the replay


def _replay(
    launcher: Launcher,
    config: Config,
    store: CheckpointStore,
    start: Record | None,
    scratch: str,
    world_size: int,
    epoch: int,
    report: ReproduceReport,
    cwd: str | None,
) -> Any:
    """Train in `scratch` until the checkpoint of `epoch` is committed; returns the epoch's result."""
    if start is not None:
        _copy(store, start, CheckpointStore(os.path.join(scratch, "checkpoints")))
    wanted = {
        **config.dict(),
        "project_root": scratch,
        "dir": scratch,
        "checkpoint_dir": None,
        "checkpoint_dir_name": "checkpoints",
        "log_path": None,
        "save_interval": 1,
        "save_interval_steps": None,
        "max_seconds": None,
        "tensorboard": False,
        "loggers": [],
    }
    now = launcher.prepare([{**wanted, "experiment_id": None}], cwd=cwd)[0]
    if config.experiment_id is not None and now.experiment_id != config.experiment_id:
        report.notes.append(
            f"the code is {now.experiment_id} now; the run was made with {config.experiment_id}"
        )
    if now.world_size != world_size:
        report.notes.append(
            f"{now.world_size} rank(s) are usual here; the run had {world_size}, and so has the replay"
        )
    replayed = Config.from_dict({**now.config, "experiment_id": config.experiment_id})
    request = request_of(replayed, scratch, nproc=world_size, stages=("train",), max_restarts=0)
    return _result_of(launcher.run(request, cwd=cwd), epoch)


def _copy(source: CheckpointStore, record: Record, target: CheckpointStore) -> None:
    """Commit the same payload again under the same name, for a run of another folder."""
    info = {key: value for key, value in record.info.items() if key not in ("run_id", "timestamp")}

    def write(file: BinaryIO) -> None:
        with open(path, "rb") as payload:
            shutil.copyfileobj(payload, file)

    path = source.open(record)
    try:
        target.commit(write, step=record.step, attempt=record.attempt, info=info, names=("latest",))
    finally:
        source.release(record)


def _result_of(handle: RunHandle, epoch: int) -> Any:
    """Follow the replay, and stop it when that epoch is finished and saved."""
    result: Any = None
    for event in handle.events():
        if event["event"] == "epoch_finished" and event["epoch"] == epoch:
            result = from_json_safe(event["result"])
        elif event["event"] == "checkpoint_committed" and f"epoch-{epoch}" in event["names"]:
            handle.interrupt("the epoch is reproduced")
    outcome = handle.outcome()
    if result is None:
        outcome.check()
        raise NotFound(
            f"the replay ended without a result of epoch {epoch}: {outcome.error or outcome.status}"
        )
    return result


# the comparison


def _compare_results(report: ReproduceReport, theirs: Any, ours: Any) -> None:
    report.compared.append("results")
    for split in sorted({*theirs, *ours}):
        was, became = theirs.get(split), ours.get(split)
        if not same(was, became):
            report.differences.append(f"result of {split}: the run has {was}, the replay {became}")


def _compare_state(report: ReproduceReport, theirs: CheckpointStore, ours: CheckpointStore) -> None:
    from danling_core.checkpoints.codec import load_state

    replayed = ours.pointed(f"epoch-{report.epoch}")
    if replayed is None:
        raise CheckpointError(f"the replay has not saved epoch {report.epoch}")
    state = load_state(ours, replayed)
    found = False
    for record in theirs.records():
        if record.step != replayed.step or record.info.get("inside") is not None:
            continue
        try:
            original = load_state(theirs, record)
        except CheckpointError as error:
            found = True
            report.differences.append(f"checkpoint {record.name} is damaged: {error}")
            continue
        if original["progress"]["epochs"] != state["progress"]["epochs"] or original["epoch"]["trained"]:
            continue
        found = True
        report.compared.append(f"checkpoint {record.name}")
        report.differences += [f"checkpoint {record.name}: {each}" for each in differences(original, state)]
    if not found:
        report.notes.append(f"no checkpoint of epoch {report.epoch} is kept: the weights were not compared")


def differences(theirs: Any, ours: Any, path: tuple[str, ...] = ()) -> list[str]:
    """Return a line for each place where two states differ, bit for bit; NaN equals itself."""
    import torch

    if path in _NO_BITS:
        return []
    name = ".".join(path)
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        lines = [f"{name}.{key} is in one of them only" for key in theirs if key not in ours]
        lines += [f"{name}.{key} is in one of them only" for key in ours if key not in theirs]
        both = [key for key in theirs if key in ours]
        return lines + [
            line for key in both for line in differences(theirs[key], ours[key], (*path, str(key)))
        ]
    if isinstance(theirs, list | tuple) and isinstance(ours, list | tuple) and len(theirs) == len(ours):
        pairs = enumerate(zip(theirs, ours, strict=True))
        return [line for at, (a, b) in pairs for line in differences(a, b, (*path, str(at)))]
    if isinstance(theirs, torch.Tensor) and isinstance(ours, torch.Tensor):
        return _tensor_difference(theirs, ours, name)
    return [] if same(theirs, ours) else [f"{name}: {_short(theirs)} and {_short(ours)}"]


def _tensor_difference(theirs: Any, ours: Any, name: str) -> list[str]:
    import torch

    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return [f"{name}: {theirs.dtype} {tuple(theirs.shape)} and {ours.dtype} {tuple(ours.shape)}"]
    a, b = (
        each.contiguous().reshape(-1).view(torch.uint8) if each.numel() else each for each in (theirs, ours)
    )
    if torch.equal(a, b):
        return []
    odd = theirs != ours
    count = int(odd.sum()) or 1
    return [f"{name}: {count} of {theirs.numel()} elements differ"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
