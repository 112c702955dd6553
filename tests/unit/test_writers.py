"""Writers: events on disk, lines of text, TensorBoard, the progress bar."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import danling_core as dl
from danling_core.errors import ConfigError, StorageError
from danling_core.launch.prepare import prepare
from danling_core.storage.json_safe import dumps, from_json_safe, to_json_safe
from danling_core.writers import EventLog, ProgressBar, TensorBoardWriter, TextLog, Writer, Writers
from danling_core.writers.follow import follow
from danling_core.writers.services import require
from danling_core.writers.tensorboard import SCORE_TAG, hyperparameters
from tests.small_runner import SmallRunner, config

FINISHED = {
    "event": "epoch_finished",
    "epoch": 0,
    "index": 0,
    "result": {"train": {"loss": 0.5}},
    "is_best": True,
}


def read(path: Path) -> list[dict[str, Any]]:
    return list(follow(path, stop=lambda: True))


# JSON


def test_json_is_valid_with_nan_infinity_and_foreign_scalars() -> None:
    np, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    value = {
        "nan": math.nan,
        "inf": [math.inf, -math.inf],
        "scalar": (np.float32(0.5), np.int64(2), torch.tensor(3), torch.tensor(math.nan), np.float64("nan")),
        "path": Path("a/b"),
        3: True,
    }
    text = dumps(value)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "nan": "NaN",
        "inf": ["Infinity", "-Infinity"],
        "scalar": [0.5, 2, 3, "NaN", "NaN"],
        "path": "a/b",
        "3": True,
    }
    back = from_json_safe(json.loads(text))
    assert math.isnan(back["nan"]) and back["inf"] == [math.inf, -math.inf]
    with pytest.raises(TypeError, match="object"):
        to_json_safe({"x": object()})


# The event log


@pytest.mark.holds("files-4")
def test_events_are_whole_lines_with_time_and_attempt(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "run" / "events.jsonl", "2.0", clock=lambda: 5.0)
    returned = log.emit("progress", loss=math.nan)
    log.on_event({"event": "failed", "time": 6.0, "attempt": "2.1"})
    log.flush()
    log.close()
    log.close()
    first, second = read(tmp_path / "run" / "events.jsonl")
    assert first == {"event": "progress", "time": 5.0, "attempt": "2.0", "loss": "NaN"}
    assert second == {"event": "failed", "time": 6.0, "attempt": "2.1"}
    assert returned["event"] == "progress" and isinstance(log, Writer)
    with pytest.raises(StorageError, match="closed"):
        log.emit("late")


def test_one_event_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(tmp_path / "events.jsonl", "1.0")
    written: list[bytes] = []
    monkeypatch.setattr(
        os, "write", lambda fd, data, _write=os.write: written.append(data) or _write(fd, data)
    )
    log.emit("failed", traceback="line\nline\n" * 10_000)
    log.close()
    assert len(written) == 1 and written[0].count(b"\n") == 1 and written[0].endswith(b"\n")


def test_a_line_torn_by_a_crash_is_cut_off_when_the_log_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "a"}\n{"event": "b", "los')
    log = EventLog(path, "1.1")
    log.emit("c")
    log.close()
    assert [event["event"] for event in read(path)] == ["a", "c"]


def test_a_short_write_is_an_error_and_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(tmp_path / "events.jsonl", "1.0")
    log.emit("a")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data, _write=os.write: _write(fd, data[:5]))
        with pytest.raises(StorageError, match="5 of"):
            log.emit("b")
    log.emit("c")
    log.close()
    assert [event["event"] for event in read(tmp_path / "events.jsonl")] == ["a", "c"]


def test_writers_share_one_event_and_all_are_closed_though_one_fails(tmp_path: Path) -> None:
    class Broken:
        def on_event(self, event: dict[str, Any]) -> None:
            seen.append(event)

        def flush(self) -> None: ...

        def close(self) -> None:
            raise OSError("disk full")

    seen: list[dict[str, Any]] = []
    log = EventLog(tmp_path / "events.jsonl", "1.0")
    writers = Writers([log, Broken()], "3.0", clock=lambda: 1.0)
    event = writers.emit("epoch_began", epoch=0)
    writers.flush()
    with pytest.raises(OSError, match="disk full"):
        writers.close()
    assert read(tmp_path / "events.jsonl") == seen == [event]
    with pytest.raises(StorageError, match="closed"):
        log.emit("late")


# The text log


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger, root = logging.getLogger("danling"), logging.getLogger()
    before = logger.handlers[:], logger.level, logger.propagate, root.handlers[:], root.level
    yield logger
    assert before == (logger.handlers[:], logger.level, logger.propagate, root.handlers[:], root.level)


@pytest.mark.holds("bugs-9")
@pytest.mark.parametrize("is_first_closed_first", [True, False])
def test_the_logger_is_left_as_it_was_found(
    logger: logging.Logger, tmp_path: Path, is_first_closed_first: bool
) -> None:
    logs = [TextLog(tmp_path / "a" / "run.log").open(), TextLog(level="debug").open().open()]
    assert len(logger.handlers) >= 3 and not logger.propagate and logger.level == logging.DEBUG
    for log in logs if is_first_closed_first else reversed(logs):
        log.close()
        log.close()


def test_lines_reach_console_and_file_and_not_the_root_logger(
    logger: logging.Logger,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with TextLog(tmp_path / "run.log", total=30) as log:
        log.on_event({**FINISHED, "seconds": 61})
        log.on_event({"event": "checkpoint_committed", "record": "r", "names": ["latest"]})
        logging.getLogger("danling.somewhere").info("from below")
        log.flush()
    error, text = capsys.readouterr().err, (tmp_path / "run.log").read_text()
    assert error == text and len(text.splitlines()) == 2
    assert text.splitlines()[0].endswith("Z epoch  0/30 | train loss 0.5000 * [1:01]")
    assert caplog.records == []


def test_other_ranks_are_heard_only_when_they_warn(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    with TextLog(rank=1) as log:
        logger.info("quiet")
        logger.warning("loss is %s", "odd")
        log.process = 1
        logger.info("now heard")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["WARNING [rank 1] loss is odd", "now heard"]


def test_a_failure_is_logged_with_its_traceback_and_print_is_left_alone(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    before = print, sys.stderr, sys.excepthook
    with TextLog() as log:
        log.on_event({"event": "failed", "error": "ValueError: no", "traceback": "Traceback ...", "rank": 1})
        log.on_event({"event": "interrupted", "reason": "SIGTERM", "step": 3})
    assert before == (print, sys.stderr, sys.excepthook)
    error = capsys.readouterr().err
    assert (
        "ERROR failed on rank 1: ValueError: no\nTraceback ..." in error and "interrupted: SIGTERM" in error
    )


# TensorBoard


def accumulate(path: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(path)).Reload()


def points(path: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, round(event.value, 6)) for event in accumulate(path).Scalars(tag)]


def finished(index: int, loss: float) -> dict[str, Any]:
    result = {"train": {"loss": loss}, "val": {"task": {"acc": 1 - loss}}}
    return {"event": "epoch_finished", "epoch": index, "index": index, "result": result}


def test_scalars_are_named_by_split_and_metric_and_visible_after_each_epoch(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    for index, loss in enumerate([0.5, 0.25]):
        writer.on_event(finished(index, loss))
        assert points(tmp_path, "train/loss")[-1] == (index, loss)
    assert points(tmp_path, "val/task/acc") == [(0, 0.5), (1, 0.75)]
    writer.on_event({"event": "evaluate_finished", "result": {"test": {"acc": 0.5}}, "seconds": 1})
    writer.summary.add_scalar("own", 3.0, 1)
    writer.close()
    writer.close()
    assert writer.summary is None and points(tmp_path, "own") == [(1, 3.0)]
    assert points(tmp_path, "evaluation/test/acc") == [(1, 0.5)]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_resumed_run_shows_each_point_once(tmp_path: Path) -> None:
    first = TensorBoardWriter(tmp_path, {"seed": 0})
    for index, loss in enumerate([0.5, 0.4, 0.3]):
        first.on_event(finished(index, loss))
    first.close()
    second = TensorBoardWriter(tmp_path, {"seed": 0}, purge_step=1)
    for index, loss in enumerate([0.4, 0.3, 0.2], start=1):
        second.on_event(finished(index, loss))
    second.close()
    assert points(tmp_path, "train/loss") == [(0, 0.5), (1, 0.4), (2, 0.3), (3, 0.2)]


def test_a_resume_on_a_slower_clock_writes_the_file_that_is_read_last(tmp_path: Path) -> None:
    old = tmp_path / "events.out.tfevents.9999999990.host.1.0"
    for index, loss in enumerate([0.5, 0.4]):
        before = set(tmp_path.iterdir())
        writer = TensorBoardWriter(tmp_path, purge_step=index or None)
        writer.on_event(finished(index, loss))
        writer.close()
        [new] = set(tmp_path.iterdir()) - before
        if index == 0:
            new.rename(old)
    assert new.name > old.name
    assert points(tmp_path, "train/loss") == [(0, 0.5), (1, 0.4)]


@pytest.mark.holds("files-5")
def test_runs_with_different_settings_compare_in_the_hparams_tab(tmp_path: Path) -> None:
    configs: list[dict[str, Any]] = [
        {"optim": {"lr": 0.1}, "deterministic": True},
        {"seed": 3, "tags": [1, 2]},
    ]
    for name, values in zip("ab", configs, strict=True):
        writer = TensorBoardWriter(tmp_path / name, values)
        writer.on_event(finished(0, 0.5))
        writer.on_event({"event": "completed", "status": {"best_score": 0.5, "score_name": "loss"}})
        writer.close()
        assert points(tmp_path / name, SCORE_TAG) == [(0, 0.5)]
    experiment = hparams_experiment(tmp_path)
    assert {info.name for info in experiment.hparam_infos} == {"optim.lr", "deterministic", "seed", "tags"}
    assert SCORE_TAG in {info.name.tag for info in experiment.metric_infos}


def hparams_experiment(log_dir: Path) -> Any:
    """What TensorBoard's own HParams plugin makes of a folder of runs."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams.backend_context import Context

    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(log_dir))
    multiplexer.Reload()
    context = Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(log_dir))))
    request = RequestContext()
    metadata = context.hparams_metadata(request, "")
    return context.experiment_from_metadata(request, "", True, metadata, [])


def test_hyperparameters_are_flat_numbers_and_texts() -> None:
    config = {"a": {"b": 1e-3, "none": None, "flag": True}, "betas": (0.9, 0.95), "name": "x"}
    assert hyperparameters(config) == {"a.b": 1e-3, "a.flag": "true", "betas": "[0.9, 0.95]", "name": "x"}


# Tracking services: what a run tells them, seen from their own side


class Scoring(SmallRunner):
    """Adds a curve of its own, and stops in the middle where it is told to."""

    def train_epoch(self, split: str = "train") -> Any:
        if self.epochs == STOP_AT.get("epoch"):
            raise dl.RunInterrupted("the test says so")
        self.write_score("mine", 7.0, "train")
        return super().train_epoch(split)


STOP_AT: dict[str, int] = {}


@pytest.mark.holds("files-6")
def test_mlflow_continues_the_run_after_a_resume_and_begins_another_for_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    wanted = config(tmp_path / "runs", loggers=["mlflow"], experiment_name="digits", group="g")
    monkeypatch.setitem(STOP_AT, "epoch", 1)
    with pytest.raises(dl.RunInterrupted):
        Scoring(wanted).run()
    client = MlflowClient()
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED"
    monkeypatch.delitem(STOP_AT, "epoch")
    resumed = Scoring(wanted)
    status = resumed.run()
    Scoring(wanted).run()  # complete: nobody is told anything
    assert status is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == resumed.name
    assert run.data.params == {
        key: str(value) for key, value in hyperparameters(resumed.config.canonical()).items()
    }
    assert run.data.metrics["score"] == status.best_score and run.data.tags["danling.group"] == "g"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "val/loss")] == [0, 1]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/mine")] == [0, 4]
    Scoring(wanted.replace(run_name="other", seed=9)).run()
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_a_run_whose_evaluation_is_still_to_do_is_not_finished_for_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    wanted = config(tmp_path / "runs", loggers=["mlflow"], experiment_name="digits")
    client = MlflowClient()
    for stage, told in (("train", "KILLED"), ("evaluate", "FINISHED")):
        Scoring(wanted).run([stage])
        experiment = client.get_experiment_by_name("digits")
        assert experiment is not None
        [run] = client.search_runs([experiment.experiment_id])
        assert run.info.status == told


@pytest.mark.holds("files-6")
def test_a_service_that_fails_later_costs_its_curves_and_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    database = tmp_path / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")

    class Losing(SmallRunner):
        def train_epoch(self, split: str = "train") -> Any:
            with sqlite3.connect(database) as connection:
                connection.execute("drop table if exists metrics")
            return super().train_epoch(split)

    status = Losing(config(tmp_path / "runs", loggers=["mlflow"])).run()
    assert status is not None and status.is_complete
    assert capsys.readouterr().err.count("mlflow gets nothing more of this run") == 1


def test_a_service_that_cannot_be_opened_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "no-such-scheme://nowhere")
    with pytest.raises(ConfigError, match="'mlflow'.*could not be opened.*MLFLOW_TRACKING_URI"):
        SmallRunner(config(tmp_path, loggers=["mlflow"])).run()


@pytest.mark.holds("files-6")
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_service_that_is_not_installed_is_refused_before_anything_is_created(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    wanted = config(tmp_path / "runs", loggers=[name], runner="tests.small_runner:SmallRunner")
    with pytest.raises(ConfigError, match=rf"pip install 'danling-flows\[{name}\]'"):
        prepare(wanted.dict(), str(tmp_path))
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_wandb_left_is_not_taken_for_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    for module in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="not installed"):
        require(["wandb"])


# The progress bar


def bar_on(file: io.StringIO, clock: Callable[[], float], **options: Any) -> ProgressBar:
    from rich.console import Console

    console = Console(file=file, force_terminal=True, width=150, color_system=None)
    return ProgressBar(enabled=True, console=console, clock=clock, **options)


def progress(done: float, time: float, **fields: Any) -> dict[str, Any]:
    return {"event": "progress", "time": time, "epoch": 3, "step": 12, "progress": done, **fields}


def test_the_bar_shows_epoch_steps_loss_speed_and_time_left() -> None:
    file, now = io.StringIO(), [0.0]
    bar = bar_on(file, lambda: now[0], epochs=30, steps=400)
    bar.on_event(progress(0.5, 100.0))
    now[0] = 1.0
    bar.on_event(progress(0.6, 110.0, loss=0.25, samples_per_second=1234.5))
    bar.on_event({"event": "completed", "time": 120.0})
    text = file.getvalue()
    assert "epoch 3/30 | step 12/400 | loss 0.2500 | 1234 samples/s" in text
    assert "60%" in text and "0:40 left" in text and "100%" in text


def test_the_bar_is_throttled_and_gives_stderr_back() -> None:
    file, now, stderr = io.StringIO(), [0.0], sys.stderr
    bar = bar_on(file, lambda: now[0], min_seconds=1.0)
    bar.on_event(progress(0.1, 0.0, loss=0.5))
    size = len(file.getvalue())
    for _ in range(100):
        now[0] += 0.009
        bar.on_event(progress(0.2, now[0], loss=0.75))
    assert len(file.getvalue()) == size
    now[0] += 1.0
    bar.on_event(progress(0.2, now[0], loss=0.75))
    assert "loss 0.7500" in file.getvalue()
    bar.close()
    bar.close()
    assert sys.stderr is stderr


def test_without_a_terminal_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    bar.on_event(progress(0.5, 1.0))
    bar.flush()
    bar.close()
    assert not bar.enabled and capsys.readouterr().err == ""
