"""Whole runs under torchrun, which knows nothing of saving, and how their ends are told."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from danling_core import storage
from danling_core.runs.lease import current_owner
from tests.marks import rarely
from tests.processes import wait_until
from tests.whole_runs import EXPERIMENT_ID, ROOT

FIELDS = {
    "runner": "tests.toy_runner:ToyRunner",
    "experiment_id": EXPERIMENT_ID,
    "device": "cpu",
    "epoch_end": 4,
    "dataloader": {"batch_size": 5},
    "log_interval": 2,
}


def start(
    root: Path,
    *torchrun: str,
    env: dict[str, str] | None = None,
    fields: dict[str, Any] | None = None,
    **params: Any,
) -> Any:
    """torchrun, started; 4 epochs of 5 steps on two ranks."""
    path = root / "run.json"
    path.write_text(
        json.dumps({**FIELDS, "project_root": str(root / "runs"), "params": params, **(fields or {})})
    )
    command = [sys.executable, "-m", "torch.distributed.run", *(torchrun or ALONE)]
    return subprocess.Popen(
        [*command, "-m", "danling_core.worker", str(path)],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


ALONE = ("--standalone", "--nproc-per-node", "2")


def told(root: Path) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Status, events and log of the one run."""
    [folder] = (path.parent for path in root.glob("runs/*/*/status.json"))
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return json.loads((folder / "status.json").read_text()), events, (folder / "run.log").read_text()


@pytest.mark.holds("bugs-12")
@pytest.mark.parametrize("place", rarely([{"fail_at_epoch": 1}, {"fails_in_constructor": True}]))
def test_the_rank_that_failed_is_told_and_not_the_one_that_lost_it(
    place: dict[str, Any], tmp_path: Path
) -> None:
    secret = {"TOY_API_TOKEN": "the toy fails"}
    with start(tmp_path, env=secret, fail_rank=1, **place) as process:
        errors = process.stderr.read()
    assert process.returncode == 1, errors
    status, events, log = told(tmp_path)
    assert status["status"] == "failed" and "ValueError: *** in" in status["error"], status["error"]
    last = events[-1]
    assert (last["event"], last["rank"], last["error"]) == ("failed", 1, status["error"])
    assert "toy_runner.py" in last["traceback"] and last["traceback"] in log
    assert "the toy fails" not in json.dumps([status, events]) + log


@pytest.mark.long
def test_a_sigterm_while_a_failure_is_recorded_does_not_keep_it_from_that(tmp_path: Path) -> None:
    with start(tmp_path, fails_in_constructor=True, sigterm_when_told=True) as process:
        errors = process.stderr.read()
    status, events, _ = told(tmp_path)
    assert "the toy fails loudly" in status["error"], errors
    assert (status["status"], events[-1]["event"]) == ("failed", "failed")


@pytest.mark.long
def test_a_rank_that_is_lost_after_the_completion_record_makes_no_failure(tmp_path: Path) -> None:
    with start(tmp_path, leaves_at_the_end=True) as process:
        errors = process.stderr.read()
    assert "by peer" in errors, "rank 0 met it when it left"
    status, events, log = told(tmp_path)
    assert status["status"] == "complete" and [e["event"] for e in events].count("completed") == 1
    assert "failed" not in log and "danling: None" not in errors


@pytest.mark.long
def test_a_ctrl_c_at_torchrun_saves_the_run(tmp_path: Path) -> None:
    def is_training() -> bool:
        return any('"epoch_finished"' in path.read_text() for path in tmp_path.glob("runs/*/*/events.jsonl"))

    with start(tmp_path, sleep_seconds=0.2) as process:
        wait_until(is_training, "the first epoch", 100)
        process.send_signal(signal.SIGINT)
        process.stderr.read()
    status, events, _ = told(tmp_path)
    assert status["status"] == "interrupted" and 5 < status["steps"] < 20
    assert "asked to stop: stopped before step" in events[-1]["reason"]
    saved = [event["step"] for event in events if event["event"] == "checkpoint_committed"]
    assert saved[-1] == status["steps"]


@pytest.mark.long
def test_the_owner_beats_on_a_store_that_only_its_config_names(
    s3_root: str, moto_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    options = {"endpoint_url": moto_url}
    fields = {"project_root": s3_root, "storage_options": options, "scratch": str(tmp_path / "scratch")}

    def has_beaten() -> bool:
        with storage.using(options):
            owners = [current_owner(storage.join(s3_root, name)) for name in storage.list_names(s3_root)]
        return any(owner is not None and owner.beat > 0 for owner in owners)

    with start(tmp_path, fields=fields, sleep_seconds=0.5, samples=700) as process:
        try:
            wait_until(has_beaten, "a beat of the lease", 60)
        finally:
            process.send_signal(signal.SIGINT)
            process.stderr.read()


@pytest.mark.long
def test_a_signal_on_one_of_two_nodes_saves_the_run_and_it_resumes(tmp_path: Path) -> None:
    for status_wanted, steps in (("interrupted", 16), ("complete", 100)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        nodes = [
            "--nnodes",
            "2",
            "--nproc-per-node",
            "1",
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            port,
        ]
        processes = [
            start(tmp_path, *nodes, "--node-rank", str(rank), samples=350, sigterm_at_step=3, fail_rank=1)
            for rank in (0, 1)
        ]
        errors = [process.communicate()[1] for process in processes]
        status, events, _ = told(tmp_path)
        assert (status["status"], status["steps"]) == (status_wanted, steps), errors
    resumed = next(event["resumed"] for event in events[::-1] if event["event"] == "run_started")
    assert resumed["step"] == 16
