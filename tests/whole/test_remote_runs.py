"""Whole runs of two ranks rooted in an object store: complete there, resumed from there bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from danling_core import storage
from danling_core.config import Config
from danling_core.errors import AccessDenied, NotFound, RunBusy
from danling_core.identity.ids import identify
from danling_core.launch.client import Launcher
from danling_core.mirror.pull import pull
from danling_core.runs.finding import list_runs, resolve
from danling_core.runs.folder import RunFolder, Status, read_log
from danling_core.runs.lease import Lease
from danling_core.session.open_run import open_run
from tests.marks import rarely
from tests.processes import wait_until
from tests.s3_faults import FaultyProxy
from tests.small_runner import SmallRunner, weights
from tests.small_runner import config as small_config
from tests.whole_runs import Ended, config, fault, launch

WHOLE_FILES = {
    "config.yaml",
    "metadata.json",
    "status.json",
    "results.json",
    "latest.json",
    "best.json",
    "evaluation.json",
    "events/000001.jsonl",
    "run/000001.log",
    "checkpoints/latest.json",
    "checkpoints/best.json",
}


@pytest.fixture(params=["s3", *rarely(["rclone", "gcs"])])
def root(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_root"))


@dataclass(frozen=True)
class Remote:
    """A run on a store, and its working folder on this machine."""

    folder: RunFolder
    ended: Ended

    def copy(self, path: Path) -> Ended:
        """What a machine that has nothing gets from the store."""
        path.mkdir()
        pull(self.folder, str(path))
        return Ended(path, self.ended.outcome)


def train(launcher: Launcher, wanted: Config) -> Remote:
    ended = launch(launcher, wanted)
    newest = [folder for folder, _ in list_runs(wanted.project_root)][-1]
    return Remote(newest, ended)


def wanted_on(root: str, tmp_path: Path, **fields: Any) -> Config:
    return config(root, scratch=str(tmp_path / "scratch"), **fields)


@pytest.mark.holds("system-4")
def test_a_run_leaves_everything_on_its_store(
    root: str, launcher: Launcher, in_peace: Ended, tmp_path: Path
) -> None:
    remote = train(launcher, wanted_on(root, tmp_path, tensorboard=True))
    outcome = remote.ended.outcome
    assert outcome is not None and outcome.status == "complete", outcome
    files = {entry.path for entry in storage.list_tree(remote.folder.url)}
    assert files >= WHOLE_FILES
    assert not [path for path in files if "/." in f"/{path}" or path.endswith((".tmp", "mirror.json"))]
    [(folder, status)] = list_runs(root)
    assert status is not None and status.is_complete and status.epochs == 3
    assert resolve(root, status.id) == resolve(root, status.name) == folder == remote.folder
    local = remote.ended.path
    assert read_log(folder, "events.jsonl") == (local / "events.jsonl").read_bytes()
    assert remote.ended.events[-1]["event"] == "completed"
    curves = EventAccumulator(folder.tensorboard_url).Reload()
    assert [point.step for point in curves.Scalars("val/loss")] == [0, 1, 2]
    remote.copy(tmp_path / "elsewhere").must_equal(in_peace)
    again = launch(launcher, wanted_on(root, tmp_path))
    assert again.outcome is None, "it is complete: nothing is trained"


@pytest.mark.holds("system-4")
def test_a_killed_rank_leaves_no_trace_in_the_bits(
    root: str, launcher: Launcher, in_peace: Ended, tmp_path: Path
) -> None:
    with fault("SIGKILL", 13, rank=0):  # which leaves its mirror behind
        remote = train(launcher, wanted_on(root, tmp_path))
    outcome = remote.ended.outcome
    assert outcome is not None and (outcome.status, outcome.restarts) == ("complete", 1), outcome
    assert read_log(remote.folder, "events.jsonl") == (remote.ended.path / "events.jsonl").read_bytes()
    remote.copy(tmp_path / "elsewhere").must_equal(in_peace)


@pytest.mark.long
def test_a_run_goes_on_where_its_scratch_is_gone(
    root: str, launcher: Launcher, in_peace: Ended, tmp_path: Path
) -> None:
    with fault("SIGTERM", 13):
        first = train(launcher, wanted_on(root, tmp_path))
    outcome = first.ended.outcome
    assert outcome is not None and outcome.status == "interrupted", outcome
    shutil.rmtree(tmp_path / "scratch")
    second = train(launcher, wanted_on(root, tmp_path))
    outcome = second.ended.outcome
    assert outcome is not None and outcome.status == "complete", outcome
    assert second.folder == first.folder
    started = [event for event in second.ended.events if event["event"] == "run_started"]
    assert started[-1]["resumed"]["step"] > 13
    second.copy(tmp_path / "elsewhere").must_equal(in_peace)


@pytest.mark.long
def test_a_complete_run_is_used_from_a_script_on_another_machine(s3_root: str, tmp_path: Path) -> None:
    def runner(machine: str) -> SmallRunner:
        return SmallRunner(small_config(s3_root, scratch=str(tmp_path / machine)))

    first = runner("first")
    results = first.train()
    wanted = weights(first)
    before = _contents(list_runs(s3_root)[0][0].url)
    second = runner("second")
    assert second.train() == results and weights(second) == wanted
    third = runner("third")
    outputs = third.infer("val")
    assert weights(third) == wanted and len(outputs) == 7
    assert runner("fourth").evaluate(["val"])["val"] == results[1]["val"]
    assert _contents(list_runs(s3_root)[0][0].url) == before, "nobody owns it, so nobody writes"


@pytest.mark.long
def test_a_runner_goes_on_with_a_run_whose_payloads_left_its_scratch(s3_root: str, tmp_path: Path) -> None:
    def runner() -> SmallRunner:
        return SmallRunner(small_config(s3_root, scratch=str(tmp_path / "scratch")))

    first, second = runner(), runner()
    results = first.train()
    wanted = weights(first)
    assert not list(tmp_path.glob("scratch/*/checkpoints/data/*")), "the store has them"
    assert second.train() == results and weights(second) == wanted
    shutil.rmtree(next(tmp_path.glob("scratch/*/checkpoints/data")))
    for one in (first, second):
        assert len(one.infer("val")) == 7 and one.train() == results
        assert one.evaluate(["val"])["val"] == results[1]["val"] and weights(one) == wanted


def _contents(url: str) -> dict[str, int]:
    return {entry.path: entry.size for entry in storage.list_tree(url)}


@pytest.mark.long
def test_another_name_of_the_checkpoints_folder_is_found_elsewhere(
    s3_root: str, launcher: Launcher, in_peace: Ended, tmp_path: Path
) -> None:
    wanted = wanted_on(s3_root, tmp_path, checkpoint_dir_name="weights")
    with fault("SIGTERM", 13):
        first = train(launcher, wanted)
    assert storage.list_names(storage.join(first.folder.url, "weights", "records"))
    shutil.rmtree(tmp_path / "scratch")
    second = train(launcher, wanted)
    started = [event for event in second.ended.events if event["event"] == "run_started"]
    assert started[-1]["resumed"]["step"] > 13
    assert second.ended.json("results.json") == in_peace.json("results.json")


@pytest.mark.long
def test_training_goes_on_while_the_store_is_away(
    s3_root: str, s3_proxy: FaultyProxy, launcher: Launcher, tmp_path: Path, in_peace: Ended
) -> None:
    def has_come_to(event: str) -> bool:
        logs = tmp_path.glob("scratch/*/events.jsonl")
        return any(f'"{event}"' in path.read_text() for path in logs)

    def be_away_for_most_of_it() -> None:
        wait_until(lambda: has_come_to("epoch_began"), "the first epoch", 60)
        with s3_proxy.away():
            wait_until(lambda: has_come_to("evaluate_finished"), "the last epoch", 60)
            assert not has_come_to("completed"), "it may not be complete before the store has everything"

    with ThreadPoolExecutor(1) as pool:
        absence = pool.submit(be_away_for_most_of_it)
        remote = train(launcher, wanted_on(s3_root, tmp_path, params={"step_seconds": 0.05}))
        absence.result(60)
    outcome = remote.ended.outcome
    assert outcome is not None and (outcome.status, outcome.restarts) == ("complete", 0), outcome
    copy = remote.copy(tmp_path / "elsewhere")
    assert copy.json("results.json")["results"] == in_peace.json("results.json")["results"]
    assert read_log(remote.folder, "events.jsonl") == (remote.ended.path / "events.jsonl").read_bytes()
    assert remote.folder.read_status() == remote.ended.status


@pytest.mark.long
def test_ranks_that_wait_for_a_long_absence_are_not_taken_for_hung(
    s3_root: str, s3_proxy: FaultyProxy, launcher: Launcher, tmp_path: Path
) -> None:
    def be_away_at_the_end() -> None:
        logs = tmp_path / "scratch"
        wait_until(lambda: any("epoch_began" in p.read_text() for p in logs.glob("*/events.jsonl")), "it", 60)
        with s3_proxy.away():
            wait_until(
                lambda: any("evaluate_finished" in p.read_text() for p in logs.glob("*/events.jsonl")),
                "it",
                60,
            )
            time.sleep(1.5 * hang_seconds)

    hang_seconds = 3.0
    with ThreadPoolExecutor(1) as pool:
        absence = pool.submit(be_away_at_the_end)
        remote = train(launcher, wanted_on(s3_root, tmp_path, hang_timeout_seconds=hang_seconds))
        absence.result(60)
    outcome = remote.ended.outcome
    assert outcome is not None and (outcome.status, outcome.restarts) == ("complete", 0), outcome
    status = remote.folder.read_status()
    assert status is not None and status.is_complete


@pytest.mark.long
def test_a_run_stops_where_it_may_not_run_further_ahead(
    s3_root: str, s3_proxy: FaultyProxy, launcher: Launcher, tmp_path: Path, in_peace: Ended
) -> None:
    wanted = wanted_on(s3_root, tmp_path, params={"step_seconds": 0.1}, max_unsynced_seconds=1.0)

    def be_away_until_it_stops() -> None:
        logs = tmp_path / "scratch"
        wait_until(lambda: any("epoch_began" in p.read_text() for p in logs.glob("*/events.jsonl")), "it", 60)
        with s3_proxy.away():
            wait_until(
                lambda: any('"interrupted"' in p.read_text() for p in logs.glob("*/events.jsonl")), "it", 60
            )

    with ThreadPoolExecutor(1) as pool:
        absence = pool.submit(be_away_until_it_stops)
        first = train(launcher, wanted)
        absence.result(60)
    outcome = first.ended.outcome
    assert outcome is not None and outcome.status == "interrupted", outcome
    assert "max_unsynced_seconds" in str(outcome.error)
    again = train(launcher, wanted.replace(max_unsynced_seconds=None))
    assert again.ended.outcome is not None and again.ended.outcome.status == "complete"
    copy = again.copy(tmp_path / "elsewhere")
    assert copy.json("results.json")["results"] == in_peace.json("results.json")["results"]


@pytest.mark.long
def test_a_run_that_stops_of_its_own_accord_is_not_taken_for_hung_while_the_store_is_away(
    s3_root: str, s3_proxy: FaultyProxy, launcher: Launcher, tmp_path: Path
) -> None:
    hang_seconds = 3.0

    def told(event: str) -> bool:
        return any(f'"{event}"' in path.read_text() for path in tmp_path.glob("scratch/*/events.jsonl"))

    def be_away_beyond_the_end() -> None:
        wait_until(lambda: told("epoch_began"), "the first epoch", 60)
        with s3_proxy.away():
            wait_until(lambda: told("interrupted"), "the stop", 60)
            time.sleep(1.5 * hang_seconds)

    wanted = wanted_on(s3_root, tmp_path, params={"step_seconds": 0.1}, max_unsynced_seconds=1.0)
    with ThreadPoolExecutor(1) as pool:
        absence = pool.submit(be_away_beyond_the_end)
        first = train(launcher, wanted.replace(hang_timeout_seconds=hang_seconds))
        absence.result(60)
    outcome = first.ended.outcome
    assert outcome is not None and (outcome.status, outcome.restarts) == ("interrupted", 0), outcome
    status = first.folder.read_status()
    assert status is not None and status.status == "interrupted", "once the store was back, it was told"


@pytest.mark.long
def test_an_exception_while_the_store_is_away_is_told_and_is_no_hang_of_another_rank(
    s3_root: str, s3_proxy: FaultyProxy, launcher: Launcher, tmp_path: Path
) -> None:
    def told(*events: str) -> bool:
        text = "".join(path.read_text() for path in tmp_path.glob("scratch/*/events.jsonl"))
        return any(f'"{event}"' in text for event in events)

    def be_away_until_its_end_is_told() -> None:
        wait_until(lambda: told("epoch_began"), "the first epoch", 60)
        with s3_proxy.away():
            wait_until(lambda: told("failed", "restarting"), "the end", 60)

    wanted = wanted_on(s3_root, tmp_path, params={"step_seconds": 0.05}, hang_timeout_seconds=3.0)
    with ThreadPoolExecutor(1) as pool, fault("raise", 13):
        absence = pool.submit(be_away_until_its_end_is_told)
        outcome = train(launcher, wanted).ended.outcome
        absence.result(60)
    assert outcome is not None and (outcome.status, outcome.restarts) == ("failed", 0), outcome
    assert (outcome.rank, outcome.step) == (0, 13) and "mine, and told" in str(outcome.error)
    [(_, status)] = list_runs(s3_root)
    assert status is not None and status.error == outcome.error, "it is in the store, too"


class Trouble(Exception):
    """Of the user's own."""


class LosesItsMirror(SmallRunner):
    """Raises while the store is away, and nothing delivers any more."""

    def train_step(self, data: Any) -> Any:
        os.kill(self.run_session.files._delivery._mirror.pid, signal.SIGKILL)
        raise Trouble("mine")


def test_a_store_that_is_away_hides_no_error(s3_root: str, tmp_path: Path) -> None:
    runner = LosesItsMirror(small_config(s3_root, scratch=str(tmp_path / "scratch")))
    with pytest.raises(Trouble, match="mine"):
        runner.train()
    [told] = tmp_path.glob("scratch/*/status.json")
    status = json.loads(told.read_text())
    assert status["status"] == "failed" and status["error"].endswith("Trouble: mine")
    assert "this machine delivers it" in next(tmp_path.glob("scratch/*/run.log")).read_text()


class LosesItsMirrorAtTheEnd(SmallRunner):
    """Its mirror dies when the run is over, and nothing delivers any more."""

    def finish(self, *given: Any) -> Any:
        status = super().finish(*given)
        os.kill(self.run_session.files._delivery._mirror.pid, signal.SIGKILL)
        return status


@pytest.mark.long
def test_a_store_that_calls_a_run_complete_has_its_last_event(s3_root: str, tmp_path: Path) -> None:
    """For the next start finds the run complete, and delivers nothing."""
    LosesItsMirrorAtTheEnd(small_config(s3_root, scratch=str(tmp_path / "scratch"))).run()
    [(folder, status)] = list_runs(s3_root)
    assert status is not None and status.is_complete
    assert json.loads(read_log(folder, "events.jsonl").splitlines()[-1])["event"] == "completed"


@pytest.mark.parametrize("refusal", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"])
def test_a_store_that_refuses_is_said_before_anything_is_made(
    refusal: str, s3_root: str, s3_proxy: FaultyProxy, tmp_path: Path
) -> None:
    s3_proxy.refusal = refusal
    wanted = wanted_on(s3_root, tmp_path)
    before = len(s3_proxy.requests)
    with pytest.raises(AccessDenied, match="the store refuses .*access key ending in '1234'"):
        open_run(wanted, identify(wanted, None))
    refused = s3_proxy.requests[before:]
    assert len(refused) == len(set(refused)), "a refusal was repeated"
    s3_proxy.refusal = None
    assert storage.list_tree(s3_root) == [] and not (tmp_path / "scratch").exists()


def test_a_missing_bucket_is_said_before_anything_is_made(s3_root: str, tmp_path: Path) -> None:
    wanted = wanted_on("s3://no-such-bucket-at-all/experiments", tmp_path)
    with pytest.raises(NotFound, match="no such bucket"):
        open_run(wanted, identify(wanted, None))
    assert not (tmp_path / "scratch").exists()


def test_a_store_that_may_only_be_read_is_said_before_anything_is_made(
    s3_root: str, s3_proxy: FaultyProxy, tmp_path: Path
) -> None:
    s3_proxy.refusal, s3_proxy.refused_methods = "AccessDenied", ("PUT", "POST", "DELETE")
    wanted = wanted_on(s3_root, tmp_path)
    with pytest.raises(AccessDenied, match="cannot create"):
        open_run(wanted, identify(wanted, None))


def test_listing_reads_each_run_once_and_complete_ones_never_again(
    s3_root: str, s3_proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for number in range(20):
        folder = RunFolder(f"{s3_root}/toy-{number:016x}/20261121-120000-{number:06d}")
        folder.write_status(Status(status="complete", name="toy", id=f"{number:016x}"))
        storage.write_bytes(folder.config_url, b"epoch_end: 1")
    for expected in (1 + 20, 1):
        s3_proxy.requests.clear()
        assert len(list_runs(s3_root)) == 20
        assert len(s3_proxy.requests) == expected, s3_proxy.requests


def test_a_second_driver_is_told_who_trains(s3_root: str, tmp_path: Path) -> None:
    wanted = wanted_on(s3_root, tmp_path)
    first = open_run(wanted, identify(wanted, None))
    assert isinstance(first.lease, Lease)
    with pytest.raises(RunBusy, match=r"is owned by .*, pid \d+ on "):
        open_run(wanted, identify(wanted, None))
    first.lease.release()
