"""Events become openings and closings, also when ranks repeat what they had done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from danling_core.config import Config
from flows.naming import stage_name
from flows.outcome import RunOutcome
from flows.page import run_page
from tasks.observation import Observation
from tasks.unclosed import ended_inside
from tests.small_runner import SmallRunner, config
from tests.small_runner import events as events_of


def _began(epoch: int) -> dict[str, Any]:
    return {"event": "epoch_began", "epoch": epoch, "index": epoch, "step": 4 * epoch}


def _finished(epoch: int, loss: float = 0.5) -> dict[str, Any]:
    return {"event": "epoch_finished", "epoch": epoch, "index": epoch, "result": {"train": {"loss": loss}}}


def _began_at(step: int) -> dict[str, Any]:
    """In step mode; four steps make an epoch."""
    return {"event": "epoch_began", "epoch": step // 4, "index": None, "step": step}


def _finished_at(step: int, loss: float = 0.5) -> dict[str, Any]:
    return {**_finished(step // 4, loss), "index": step}


def _stages(*events: dict[str, Any]) -> tuple[list[tuple[Any, bool]], list[str]]:
    """Every stage as (epoch or None, whether it was closed), and what was said about differences."""
    differences: list[str] = []
    observation = Observation(iter(events), on_difference=differences.append)
    stages = []
    while (opening := observation.next_opening()) is not None:
        stages.append((opening.get("epoch"), observation.until_closed(opening) is not None))
    return stages, differences


def test_each_epoch_opens_and_closes_once() -> None:
    progress = {"event": "progress", "epoch": 0}
    assert _stages(_began(0), progress, _finished(0), _began(1), _finished(1))[0] == [(0, True), (1, True)]


def test_the_evaluation_is_a_stage_too() -> None:
    events = (_began(0), _finished(0), {"event": "evaluate_began"}, {"event": "evaluate_finished"})
    assert _stages(*events)[0] == [(0, True), (None, True)]


def test_a_finished_epoch_that_is_repeated_after_a_restart_opens_no_more() -> None:
    restart = {"event": "run_started", "attempt": "1.1"}
    events = (_began(0), _finished(0), _began(1), restart, _began(0), _finished(0), _began(1), _finished(1))
    assert _stages(*events) == ([(0, True), (1, True)], [])


def test_a_repeated_epoch_that_ends_in_other_values_is_reported() -> None:
    stages, differences = _stages(_began(0), _finished(0, 0.5), _began(0), _finished(0, 0.6), _began(1))
    assert stages == [(0, True), (1, False)]
    assert len(differences) == 1 and "epoch 0" in differences[0]


def test_an_epoch_without_an_end_is_left_open_when_the_next_begins() -> None:
    assert _stages(_began(0), _began(1), _finished(1))[0] == [(0, False), (1, True)]


def test_the_terminal_event_is_kept_and_ends_the_open_stage() -> None:
    observation = Observation(iter([_began(0), {"event": "failed", "error": "boom"}]))
    opening = observation.next_opening()
    assert opening is not None and observation.until_closed(opening) is None
    assert observation.terminal is not None and observation.terminal["error"] == "boom"


def test_every_event_is_heard_once_and_in_order() -> None:
    heard: list[dict[str, Any]] = []
    events = [_began(0), _began(1), _finished(1), {"event": "completed"}]
    observation = Observation(iter(events), heard.append)
    while (opening := observation.next_opening()) is not None:
        observation.until_closed(opening)
    assert heard == events


def test_in_step_mode_every_stretch_between_evaluations_is_a_stage_and_none_is_a_repetition(
    tmp_path: Path,
) -> None:
    runner = SmallRunner(config(tmp_path, step_end=9, evaluate_interval_steps=2))
    runner.run()
    differences: list[str] = []
    observation = Observation(iter(events_of(runner)), on_difference=differences.append)
    closings = []
    while (opening := observation.next_opening()) is not None:
        closings.append(observation.until_closed(opening))
    assert [closing and closing.get("index") for closing in closings] == [2, 4, 6, 8, 9, None]
    assert list(observation.finished) == list(runner.results) == [2, 4, 6, 8, 9]
    assert differences == []


def test_in_step_mode_a_restart_inside_a_stretch_leaves_it_open_and_before_it_opens_nothing_again() -> None:
    restart = {"event": "run_started", "attempt": "1.1"}
    events = (
        _began_at(0),
        _finished_at(2),
        _began_at(2),
        restart,
        _began_at(3),
        _finished_at(4),
        _began_at(4),
    )
    observation = Observation(iter(events))
    closed = []
    while (opening := observation.next_opening()) is not None:
        closing = observation.until_closed(opening)
        closed.append((opening["step"], closing and closing["index"]))
    assert closed == [(0, 2), (2, 4), (4, None)]
    repeated = (_began_at(0), _finished_at(2), _began_at(2), restart, _began_at(0), _finished_at(2, 0.7))
    stages, differences = _stages(*repeated, _began_at(2), _finished_at(4))
    assert stages == [(0, True), (0, True)]
    assert len(differences) == 1 and "step 2" in differences[0]


def test_a_span_is_closed_by_its_last_epoch_or_by_what_ends_the_run() -> None:
    events = [each for epoch in range(4) for each in (_began(epoch), _finished(epoch))]
    evaluation = {"event": "evaluate_began"}
    observation = Observation(iter([*events, evaluation, {"event": "evaluate_finished"}]))
    opening = observation.next_opening()
    assert opening is not None
    closing = observation.until_closed(opening, last=2)
    assert closing is not None and closing["index"] == 2
    opening = observation.next_opening()
    assert opening is not None and opening["index"] == 3
    closing = observation.until_closed(opening, last=9)
    assert closing is not None and closing["index"] == 3, "the run stopped early"
    assert observation.next_opening() == evaluation
    assert list(observation.finished) == [0, 1, 2, 3]


def test_an_exit_inside_a_stage_is_told_at_once_and_kept_for_later() -> None:
    def events() -> Iterator[dict[str, Any]]:
        yield _began(0)
        raise KeyboardInterrupt

    told: list[BaseException] = []
    observation = Observation(events(), on_cut_off=told.append)
    opening = observation.next_opening()
    assert opening is not None and observation.until_closed(opening) is None
    assert [type(each) for each in told] == [KeyboardInterrupt] and observation.cut_off is told[0]
    state = ended_inside(observation, "epoch-0")
    assert state.is_cancelled() and "KeyboardInterrupt" in str(state.message)


@pytest.mark.parametrize(
    ("index", "end", "name"),
    [
        (0, 3, "epoch-0"),
        (99, 300, "epoch-99"),
        (100, 300, "epochs-100-109"),
        (103, 300, "epochs-103-109"),
        (240, 249, "epochs-240-248"),
        (1000, 5000, "epochs-1000-1099"),
        (12345, 20000, "epochs-12345-12999"),
    ],
)
def test_task_runs_stand_for_spans_beyond_a_hundred_epochs(index: int, end: int, name: str) -> None:
    assert stage_name(_began(index), Config(epoch_end=end)) == name


@pytest.mark.parametrize(
    ("folder", "place"),
    [
        ("/data/runs/toy 1", "`/data/runs/toy 1`"),
        (
            "s3://bucket/a/b",
            "[s3://bucket/a/b](https://s3.console.aws.amazon.com/s3/buckets/bucket?prefix=a/b/)",
        ),
        (
            "gs://bucket/a/b",
            "[gs://bucket/a/b](https://console.cloud.google.com/storage/browser/bucket/a/b)",
        ),
    ],
)
def test_a_page_links_what_a_browser_can_open_and_says_the_commands(folder: str, place: str) -> None:
    page = run_page(RunOutcome("interrupted", "toy-run", "0" * 16, folder=folder), "abc-def")
    assert place in page and "danling resume" in page and "code `abc-def`" in page
    assert "danling reproduce" in run_page(RunOutcome("complete", "toy-run", "0" * 16, folder=folder), "abc")
