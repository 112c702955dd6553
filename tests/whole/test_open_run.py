"""Real processes for what tests/unit/test_open_run.py tries without them."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.queues import Queue
from pathlib import Path

import pytest

from danling_core import storage
from danling_core.errors import RunBusy
from danling_core.session.open_run import open_run
from tests.unit.test_open_run import make


def _open(root: str, tmp_path: Path, start: object, results: Queue[str], done: object) -> None:
    config, identity = make(root, tmp_path)
    start.wait()  # type: ignore[attr-defined]
    try:
        opened = open_run(config, identity)
        results.put(opened.folder.url)
    except RunBusy as error:
        results.put(f"busy: {error}")
    done.wait()  # type: ignore[attr-defined]


@pytest.mark.holds("levels-5")
def test_of_two_drivers_started_at_once_one_creates_and_one_is_told(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, results, done = context.Barrier(2), context.Queue(), context.Barrier(3)
    root = os.fspath(tmp_path / "root")
    arguments = (root, tmp_path, start, results, done)
    processes = [context.Process(target=_open, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    answers = sorted(results.get(timeout=60) for _ in processes)
    done.wait()
    for process in processes:
        process.join(60)
    assert answers[0].startswith(root) and answers[1].startswith("busy: ")
    _, identity = make(root, tmp_path)
    names = storage.list_names(os.path.join(root, f"experiment-run-{identity.id}"))
    assert len(names) == 2, "the lease and one run"
