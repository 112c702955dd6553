"""The reporter keeps training and the orchestrator apart."""

from __future__ import annotations

import threading

from tasks.reporter import Reporter, reporting

DEADLINE = 10.0


def test_what_is_submitted_is_reported_in_another_thread() -> None:
    reporter = Reporter()
    threads: list[str] = []
    reporter.submit("a", lambda: threads.append(threading.current_thread().name))
    assert reporter.close(DEADLINE)
    assert threads == ["danling-reporter"]


def test_of_reports_that_wait_under_one_key_only_the_newest_is_made() -> None:
    reporter, gate, made = Reporter(), threading.Event(), []
    reporter.submit("gate", lambda: gate.wait(DEADLINE))
    for number in range(100):
        reporter.submit("progress", lambda number=number: made.append(number))
    gate.set()
    assert reporter.close(DEADLINE)
    assert made[-1] == 99 and len(made) <= 2


def test_one_key_is_reported_at_most_once_an_interval_until_the_drain() -> None:
    now, made = [0.0], []
    reporter = Reporter(min_interval_seconds=60.0, clock=lambda: now[0])
    first = threading.Event()
    reporter.submit("progress", lambda: (made.append(1), first.set()))
    assert first.wait(DEADLINE)
    reporter.submit("progress", lambda: made.append(2))
    other = threading.Event()
    reporter.submit("other", other.set)
    assert other.wait(DEADLINE)
    assert made == [1]
    assert reporter.close(DEADLINE)
    assert made == [1, 2]


def test_the_queue_is_bounded_and_drops_the_oldest_key() -> None:
    reporter, gate, made = Reporter(max_waiting=3), threading.Event(), []
    started = threading.Event()
    reporter.submit("gate", lambda: (started.set(), gate.wait(DEADLINE)))
    assert started.wait(DEADLINE)
    for number in range(10):
        reporter.submit(f"key-{number}", lambda number=number: made.append(number))
    gate.set()
    assert reporter.close(DEADLINE)
    assert made == [7, 8, 9]
    assert reporter.dropped == 7


def test_a_report_that_fails_neither_raises_nor_stops_the_next() -> None:
    reporter, made = Reporter(), []
    reporter.submit("bad", lambda: 1 / 0)
    reporter.submit("good", lambda: made.append(True))
    assert reporter.close(DEADLINE)
    assert made == [True]
    assert reporter.failed == 1


def test_a_report_that_hangs_holds_nobody_up_beyond_the_deadline() -> None:
    reporter, gate = Reporter(), threading.Event()
    reporter.submit("hangs", lambda: gate.wait(60.0))
    assert not reporter.close(deadline_seconds=0.05)
    gate.set()


def test_after_the_end_nothing_is_reported_and_nothing_is_raised() -> None:
    reporter, made = Reporter(), []
    reporter.close(DEADLINE)
    reporter.submit("late", lambda: made.append(True))
    assert reporter.drain(DEADLINE)
    assert made == []


def test_flows_inside_one_another_share_a_reporter() -> None:
    with reporting() as outer, reporting() as inner:
        assert inner is outer
