"""Launching ranks for real: outcomes, restarts, stops, what leaks and what is left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from danling_core.errors import ConfigError, LaunchError, RunFailed, RunInterrupted
from danling_core.launch.client import Launcher, Outcome, RunHandle, RunRequest
from danling_core.launch.group import _Agent
from danling_core.process_tree import END, children_of, is_alive, start_time
from danling_core.runs.folder import RunFolder
from tests.marks import rarely
from tests.processes import listening, tree, wait_until

ENTRYPOINTS: dict[str, Any] = {
    "rank_entrypoint": "tests.launch_toy:run_rank",
    "prepare_entrypoint": "tests.launch_toy:prepare",
}
ROOT = str(Path(__file__).parents[2])


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher(**ENTRYPOINTS) as launcher:
        yield launcher


def request(folder: Path, role: str, **fields: Any) -> RunRequest:
    known = {name: fields.pop(name) for name in list(fields) if name in RunRequest.__dataclass_fields__}
    return RunRequest(config={"role": role, **fields}, work_dir=str(folder), **{"nproc": 2, **known})


def finish(launcher: Launcher, folder: Path, role: str, **fields: Any) -> tuple[list[str], Outcome]:
    handle = launcher.run(request(folder, role, **fields), cwd=ROOT)
    kinds = [event["event"] for event in handle.events()]
    return kinds, handle.outcome(60)


def begin(launcher: Launcher, folder: Path, role: str, **fields: Any) -> RunHandle:
    """Launch, and wait until every rank is there."""
    handle = launcher.run(request(folder, role, **fields), cwd=ROOT)
    paths = [folder / f"rank-{rank}-0.json" for rank in range(handle.request.nproc)]
    wait_until(lambda: all(path.exists() for path in paths), "the ranks' start")
    next(handle.events())
    return handle


def note(folder: Path, rank: int = 0, restart: int = 0) -> dict[str, Any]:
    noted: dict[str, Any] = json.loads((folder / f"rank-{rank}-{restart}.json").read_text())
    return noted


def last_event(folder: Path) -> dict[str, Any]:
    event: dict[str, Any] = json.loads((folder / "events.jsonl").read_text().splitlines()[-1])
    return event


class Tree:
    """Some processes, by pid and start, so that their end can be told from their pid's reuse."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.members = [(pid, start_time(pid)) for pid in pids]
        assert all(started is not None for _, started in self.members), "it has ended already"

    def must_end(self, seconds: float = 10.0) -> None:
        wait_until(lambda: not self.living(), f"the end of {self.living()}", seconds)

    def living(self) -> list[int]:
        return [pid for pid, started in self.members if is_alive(pid, started)]


def descendants(pid: int) -> list[int]:
    children = children_of(pid)
    return children + [below for child in children for below in descendants(child)]


# Outcomes


def test_a_run_is_complete_when_its_terminal_event_says_so(launcher: Launcher, tmp_path: Path) -> None:
    kinds, outcome = finish(launcher, tmp_path, "complete")
    assert kinds == ["run_started", "completed"]
    assert outcome.check() == Outcome("complete")


def test_an_abort_after_completion_is_no_failure(launcher: Launcher, tmp_path: Path) -> None:
    kinds, outcome = finish(launcher, tmp_path, "abort_after_completed")
    assert (kinds, outcome.status, outcome.restarts) == (["completed"], "complete", 0)


@pytest.mark.holds("bugs-12")
def test_an_exception_is_final_and_its_traceback_is_told(launcher: Launcher, tmp_path: Path) -> None:
    kinds, outcome = finish(launcher, tmp_path, "misbehave", bad="raise", rank=1)
    assert kinds[-1] == "failed"
    assert (outcome.status, outcome.rank, outcome.step, outcome.restarts) == ("failed", 1, 3, 0)
    assert outcome.error == "rank 1 failed at step 3: ValueError: the loss is a fish"
    lines = (outcome.traceback or "").splitlines()
    assert "launch_toy.py" in lines[1], "the user's frames come first"
    with pytest.raises(RunFailed, match="fish") as failure:
        outcome.check()
    assert failure.value.rank == 1
    assert last_event(tmp_path)["traceback"] == outcome.traceback
    status = RunFolder(str(tmp_path)).read_status()
    assert status is not None and (status.status, status.error) == ("failed", outcome.error)


def test_a_rank_killed_by_a_signal_is_relaunched(launcher: Launcher, tmp_path: Path) -> None:
    kinds, outcome = finish(launcher, tmp_path, "echo", bad="SIGKILL", rank=1)
    assert kinds == ["restarting", "completed"]
    assert (outcome.status, outcome.restarts) == ("complete", 1)
    told = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[0])
    assert told["error"].startswith("rank 1 was killed by SIGKILL at step 3")


def test_an_exception_is_told_instead_of_the_errors_that_it_causes(
    launcher: Launcher, tmp_path: Path
) -> None:
    _, outcome = finish(launcher, tmp_path, "echo", bad="raise", rank=0)
    assert (outcome.status, outcome.rank) == ("failed", 0)
    assert "fish" in (outcome.error or "")


def test_the_same_step_failing_twice_is_poisoned(launcher: Launcher, tmp_path: Path) -> None:
    kinds, outcome = finish(launcher, tmp_path, "misbehave", bad="SIGSEGV", times=9, moves=False, nproc=1)
    assert kinds == ["run_started", "restarting", "run_started", "failed"]
    assert (outcome.status, outcome.step, outcome.restarts) == ("failed", 3, 1)
    assert "step 3 failed twice" in (outcome.error or "") and "SIGSEGV" in (outcome.error or "")


def test_restarts_are_counted(launcher: Launcher, tmp_path: Path) -> None:
    fields = {"bad": "SIGKILL", "times": 9, "nproc": 1, "max_restarts": 2}
    kinds, outcome = finish(launcher, tmp_path, "misbehave", **fields)
    assert kinds.count("run_started") == 3
    assert outcome.restarts == 2 and "max_restarts is 2" in (outcome.error or "")


def test_a_stuck_rank_is_found_its_stacks_are_dumped_and_it_is_relaunched(
    launcher: Launcher, tmp_path: Path
) -> None:
    # One rank: two would write their stacks into each other's, in the file that they share here.
    fields = {"bad": "hang", "rank": 0, "nproc": 1, "hang_timeout_seconds": 3.0}
    kinds, outcome = finish(launcher, tmp_path, "misbehave", **fields)
    assert kinds == ["run_started", "restarting", "run_started", "completed"]
    assert "hung at step 3" in (tmp_path / "events.jsonl").read_text()
    connection = launcher._connection
    assert connection is not None
    assert "in hang_here" in Path(connection.stderr_path).read_text(), "the toy's fd 2 is the launcher's"


@pytest.mark.parametrize(("bad", "words"), [("exit", "sys.exit(0)"), ("vanish", "exited with code 0")])
def test_a_rank_that_leaves_quietly_has_failed(
    launcher: Launcher, tmp_path: Path, bad: str, words: str
) -> None:
    _, outcome = finish(launcher, tmp_path, "misbehave", bad=bad, nproc=1)
    assert outcome.status == "failed" and words in (outcome.error or "")


def test_a_rank_that_ended_before_it_was_looked_at_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine comes back from the start of ranks when the first of them is gone already."""
    ended = multiprocessing.get_context("spawn").Process(target=os.getpid)
    ended.start()
    os.kill(ended.pid or 0, signal.SIGKILL)
    ended.join()
    assert ended not in multiprocessing.active_children()
    agent: Any = object.__new__(_Agent)
    agent.watch = SimpleNamespace(adopt=lambda pids, now: None)
    agent._pcontext = SimpleNamespace(_pc=SimpleNamespace(processes=[ended]))
    monkeypatch.setattr(LocalElasticAgent, "_start_workers", lambda self, group: {0: ended.pid})
    agent._start_workers(None)
    assert agent.processes[0].exitcode == -signal.SIGKILL


def test_a_rank_that_dies_by_a_signal_leaves_its_stack(launcher: Launcher, tmp_path: Path) -> None:
    finish(launcher, tmp_path, "misbehave", bad="SIGSEGV", nproc=1, max_restarts=0)
    assert launcher._connection is not None
    told = Path(launcher._connection.stderr_path).read_text()
    assert "Segmentation fault" in told and "in _bad" in told.rpartition("Segmentation fault")[2]


def test_a_working_folder_that_is_gone_is_told(launcher: Launcher, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    with pytest.raises(ConfigError, match=f"working folder '{gone}'"):
        launcher.prepare([{"runner": "tests.toy_runner:ToyRunner"}], cwd=gone)
    outcome = launcher.run(request(tmp_path, "complete"), cwd=gone).outcome(30)
    assert outcome.status == "failed" and f"working folder '{gone}'" in (outcome.error or "")


def test_a_folder_that_is_gone_is_told(launcher: Launcher, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="cannot be opened"):
        finish(launcher, tmp_path / "absent", "complete")


# Stops


def test_an_interrupt_lets_the_ranks_save_and_stop(launcher: Launcher, tmp_path: Path) -> None:
    handle = begin(launcher, tmp_path, "stop_when_asked")
    handle.interrupt()
    outcome = handle.outcome(20)
    assert (outcome.status, outcome.step) == ("interrupted", 1)
    with pytest.raises(RunInterrupted):
        outcome.check()


def test_a_second_interrupt_kills_at_once(launcher: Launcher, tmp_path: Path) -> None:
    handle = begin(launcher, tmp_path, "never_stop", stop_grace_seconds=1000.0)
    handle.interrupt("cancelled by the user")
    handle.interrupt()
    outcome = handle.outcome(20)
    assert outcome.status == "interrupted" and "cancelled by the user" in (outcome.error or "")
    assert last_event(tmp_path)["event"] == "interrupted"
    status = RunFolder(str(tmp_path)).read_status()
    assert status is not None and status.status == "interrupted"


def test_ranks_that_do_not_stop_are_killed_after_the_grace(launcher: Launcher, tmp_path: Path) -> None:
    handle = begin(launcher, tmp_path, "never_stop", stop_grace_seconds=0.2)
    handle.interrupt()
    assert handle.outcome(20).status == "interrupted"


def test_sigterm_at_one_rank_stops_the_run_in_good_order(launcher: Launcher, tmp_path: Path) -> None:
    handle = begin(launcher, tmp_path, "stop_when_asked")
    os.kill(note(tmp_path, rank=1)["pid"], signal.SIGTERM)
    assert handle.outcome(20).status == "interrupted"


def test_a_run_interrupted_while_it_waits_for_its_turn_never_starts(
    launcher: Launcher, tmp_path: Path
) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    running = begin(launcher, first, "stop_when_asked")
    waiting = launcher.run(request(second, "complete"), cwd=ROOT)
    waiting.interrupt()
    running.interrupt()
    assert running.outcome(20).status == waiting.outcome(20).status == "interrupted"
    assert not (second / "rank-0-0.json").exists()


# What leaks


def test_nothing_of_one_run_is_seen_by_the_next(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    monkeypatch.setenv("DANLING_TOY", "first")
    monkeypatch.delenv("OMP_NUM_THREADS")
    launcher.run(request(here, "complete", threads_per_rank=3), cwd=str(here)).outcome(30)
    monkeypatch.delenv("DANLING_TOY")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    launcher.run(request(there, "complete", threads_per_rank=3), cwd=str(there)).outcome(30)
    first, second = note(here), note(there)
    assert (first["env"]["DANLING_TOY"], first["env"]["OMP_NUM_THREADS"]) == ("first", "3")
    assert "DANLING_TOY" not in second["env"], "a variable of the run before"
    assert second["env"]["OMP_NUM_THREADS"] == "5", "the user's own choice"
    assert second["env"]["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] == "false"
    assert (first["cwd"], first["path"]) == (str(here), str(here))
    assert (second["cwd"], second["path"]) == (str(there), str(there))


def test_ranks_hold_neither_the_protocol_nor_the_lifeline(launcher: Launcher, tmp_path: Path) -> None:
    handle = begin(launcher, tmp_path, "stop_when_asked")
    ours = {os.readlink(f"/proc/{launcher.pid}/fd/{fd}") for fd in (0, 1, 2)}
    connection = launcher._connection
    assert connection is not None and connection.process.stdin is not None
    lifeline = os.readlink(f"/proc/self/fd/{connection.process.stdin.fileno()}")
    replies = os.readlink(f"/proc/self/fd/{connection.process.stdout.fileno()}")  # type: ignore[union-attr]
    held = {os.readlink(path) for path in Path(f"/proc/{launcher.pid}/fd").iterdir()}
    assert {lifeline, replies} <= held and not {lifeline, replies} & ours
    for pid in [note(tmp_path)["server"], note(tmp_path, 0)["pid"], note(tmp_path, 1)["pid"]]:
        theirs = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
        assert not {lifeline, replies} & theirs, f"process {pid} holds a pipe of the driver"
    handle.interrupt()
    handle.outcome(20)


@pytest.mark.holds("config-5")
def test_no_secret_reaches_a_file_or_a_command_line(
    tmp_path: Path, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DANLING_TOY", "swordfish-42")
    handle = begin(launcher, tmp_path, "stop_when_asked")
    connection = launcher._connection
    assert connection is not None and launcher.pid is not None
    for path in Path(connection.folder).rglob("*"):
        assert path.is_dir() or path.is_socket() or b"swordfish" not in path.read_bytes(), path
    for pid in [launcher.pid, *descendants(launcher.pid)]:
        assert b"swordfish" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    handle.interrupt()
    handle.outcome(20)
    assert [path.name for path in Path(connection.folder).glob("launch-*")] == [], "of the run"


# Preparation


@pytest.fixture
def module(tmp_path: Path) -> Iterator[Any]:
    def write(source: str) -> dict[str, Any]:
        (tmp_path / "my_runner.py").write_text(textwrap.dedent(source))
        return {"runner": "my_runner:Mine"}

    yield write


def test_configs_are_prepared_in_one_fresh_process(
    launcher: Launcher, tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = module("class Mine: pass")
    monkeypatch.setenv("DANLING_TOY", "now")
    one, two = launcher.prepare([config, {**config, "seed": 1}], cwd=str(tmp_path))
    assert one.config["pid"] == two.config["pid"] not in (os.getpid(), launcher.pid)
    assert (one.config["cwd"], one.config["seen"], two.config["seed"]) == (str(tmp_path), "now", 1)
    assert (one.world_size, one.device) == (2, "cpu")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemExit(3)", "sys.exit\\(3\\)"),
        ("class Other: pass", "has no attribute 'Mine'"),
        ("import os\nos.kill(os.getpid(), 11)", "SIGSEGV"),
        ("import os\nos.write(2, b'last words')\nos._exit(4)", "exit code 4:\nlast words"),
    ],
)
def test_a_runner_that_cannot_be_imported_is_a_config_error(
    launcher: Launcher, tmp_path: Path, module: Any, source: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=f"(?s)cannot import runner 'my_runner:Mine': .*{words}"):
        launcher.prepare([module(source)], cwd=str(tmp_path))


def test_an_import_without_end_is_given_up(launcher: Launcher, tmp_path: Path, module: Any) -> None:
    with pytest.raises(ConfigError, match="no end after 0.3 s for 1 config.*git"):
        launcher.prepare([module("import time\ntime.sleep(1000)")], cwd=str(tmp_path), timeout_seconds=0.3)


@pytest.mark.long
def test_git_is_asked_once_for_all_configs_of_a_preparation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"
    (tmp_path / "git").write_text(f'#!/bin/sh\necho "$*" >> {asked}\nexec {shutil.which("git")} "$@"\n')
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    config = {"runner": "tests.toy_runner:ToyRunner", "epoch_end": 1, "project_root": str(tmp_path / "runs")}
    with Launcher() as launcher:
        [alone] = launcher.prepare([config], cwd=ROOT)
        for_one = asked.read_text()
        sweep = launcher.prepare([{**config, "seed": seed} for seed in range(3)], cwd=ROOT)
    assert for_one and asked.read_text() == for_one * 2
    assert {prepared.experiment_id for prepared in sweep} == {alone.experiment_id}


@pytest.mark.long
@pytest.mark.skipif(bool(list(Path("/dev").glob("nvidia[0-9]*"))), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_bad_input_before_anything_is_created(tmp_path: Path) -> None:
    """To a flow, which prepares, and to the worker under torchrun."""
    file, root = tmp_path / "run.json", tmp_path / "runs"
    config = {
        "runner": "tests.toy_runner:ToyRunner",
        "epoch_end": 1,
        "project_root": str(root),
        "device": "cuda",
    }
    with Launcher() as launcher, pytest.raises(ConfigError, match="torch finds no GPU"):
        launcher.prepare([config], cwd=ROOT)
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", "danling_core.worker", str(file)]
    worker = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert worker.returncode == 2 and not root.exists()
    assert worker.stderr.startswith("danling: device is 'cuda'") and "Traceback" not in worker.stderr


def test_a_config_error_comes_back_as_it_is(launcher: Launcher) -> None:
    with pytest.raises(ConfigError, match="^runner is missing$"):
        launcher.prepare([{"runner": None}], cwd=ROOT)


def test_what_a_runner_prints_does_not_disturb_the_protocol(
    launcher: Launcher, tmp_path: Path, module: Any
) -> None:
    config = module("print('{\"id\": 1}', flush=True)\nclass Mine: pass")
    assert launcher.prepare([config], cwd=str(tmp_path))[0].config["runner"] == "my_runner:Mine"


# No orphans

DRIVER = """
import json, os, sys
from pathlib import Path
from danling_core.launch.client import Launcher, RunRequest
launcher = Launcher(**json.loads(sys.argv[1]))
config = {"role": sys.argv[3]}
handle = launcher.run(RunRequest(config, sys.argv[2], nproc=2, stop_grace_seconds=1.0, max_restarts=0))
for event in handle.events():
    print(json.dumps({"event": event, "launcher": launcher.pid}), flush=True)
"""


def start_driver(folder: Path, role: str) -> tuple[subprocess.Popen[str], Tree]:
    """A driver of its own, the launcher, the fork server, two ranks, and their loader workers."""
    command = [sys.executable, "-c", DRIVER, json.dumps(ENTRYPOINTS), str(folder), role]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        return driver, _tree_below(driver, folder, role)
    except BaseException:
        driver.kill()
        raise


def _tree_below(driver: subprocess.Popen[str], folder: Path, role: str) -> Tree:
    assert driver.stdout is not None
    launcher = json.loads(driver.stdout.readline())["launcher"]
    wait_until(lambda: (folder / "rank-1-0.json").exists(), "rank 1")
    if role == "with_loader":
        driver.stdout.readline()
        wait_until(lambda: len(descendants(note(folder, 1)["pid"])) == 3, "the loader of rank 1")
    return Tree([driver.pid, launcher, *descendants(launcher)])


@pytest.mark.holds("system-7")
@pytest.mark.parametrize("death", [signal.SIGKILL, *rarely([signal.SIGTERM])])
@pytest.mark.parametrize("victim", ["driver", "launcher"])
def test_no_process_is_left_whoever_dies(tmp_path: Path, victim: str, death: signal.Signals) -> None:
    driver, tree = start_driver(tmp_path, "with_loader")
    assert len(tree.members) >= 2 + 1 + 2 + 6, "launcher, server, ranks, workers and children of ranks"
    os.kill(driver.pid if victim == "driver" else tree.members[1][0], death)
    tree.must_end()
    driver.wait()
    assert driver.stdout is not None
    driver.stdout.close()


@pytest.mark.parametrize(
    ("victim", "death"),
    [
        ("rank", signal.SIGKILL),
        *rarely([("rank", signal.SIGTERM), ("fork server", END), ("fork server", signal.SIGKILL)]),
    ],
)
def test_no_rank_is_left_when_another_or_their_server_dies(
    launcher: Launcher, tmp_path: Path, victim: str, death: signal.Signals
) -> None:
    handle = begin(launcher, tmp_path, "with_loader", max_restarts=0, stop_grace_seconds=1.0)
    ranks = [note(tmp_path, rank)["pid"] for rank in (0, 1)]
    wait_until(lambda: all(len(children_of(pid)) == 3 for pid in ranks), "the loaders")
    server = note(tmp_path)["server"]
    tree = Tree([*ranks, *(child for pid in ranks for child in descendants(pid))])
    os.kill(ranks[1] if victim == "rank" else server, death)
    # Rank 0 takes elastic's SIGTERM for a wish to stop, and says so: the death of its peer is the truth.
    is_graceful = (victim, death) == ("rank", signal.SIGTERM)
    assert handle.outcome(30).status == ("interrupted" if is_graceful else "failed")
    tree.must_end()


@pytest.mark.long
def test_the_death_of_the_fork_server_costs_a_restart(launcher: Launcher, tmp_path: Path) -> None:
    handle = launcher.run(request(tmp_path, "stop_when_asked"), cwd=ROOT)
    next(handle.events())
    os.kill(note(tmp_path)["server"], signal.SIGKILL)
    wait_until(lambda: (tmp_path / "rank-1-1.json").exists(), "the second launch", 90)
    handle.interrupt()
    outcome = handle.outcome(30)
    assert (outcome.status, outcome.restarts) == ("interrupted", 1)


@pytest.mark.long
def test_a_fork_server_that_dies_while_it_warms_up_is_followed_by_another(tmp_path: Path) -> None:
    with Launcher(**ENTRYPOINTS) as launcher:
        wait_until(lambda: bool(_fork_servers(launcher)), "the fork server")
        os.kill(_fork_servers(launcher)[0], signal.SIGKILL)
        assert finish(launcher, tmp_path, "complete")[1] == Outcome("complete")


def _fork_servers(launcher: Launcher) -> list[int]:
    assert launcher.pid is not None
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children_of(launcher.pid)}
    return [pid for pid, command in commands.items() if b"multiprocessing.forkserver" in command]


@pytest.mark.long
def test_a_dead_launcher_is_told_and_the_next_request_starts_another(tmp_path: Path) -> None:
    with Launcher(**ENTRYPOINTS) as launcher:
        handle = begin(launcher, tmp_path, "stop_when_asked")
        assert launcher.pid is not None
        tree = Tree([launcher.pid, *descendants(launcher.pid)])
        os.kill(launcher.pid, signal.SIGKILL)
        with pytest.raises(LaunchError, match="killed by signal 9"):
            handle.outcome(20)
        list(handle.events())
        tree.must_end()
        assert finish(launcher, tmp_path, "complete", generation=2)[1].status == "complete"


def test_what_the_launcher_says_at_its_death_is_told() -> None:
    words = r"exited with code 1 \(.*encodings.*\)(?s:.)*last words(?s:.)*encodings"
    with Launcher(env={"PYTHONHOME": "/nowhere"}) as launcher, pytest.raises(LaunchError, match=words):
        launcher.prepare([{"runner": "tests.toy_runner:ToyRunner"}])


def test_a_launcher_that_dies_within_a_reply_is_told(tmp_path: Path) -> None:
    """The words of a Python that ends in the middle of a line, once it has been asked for something."""
    source = 'import os; os.read(0, 1); os.write(1, b\'{"id": 1, "outc\'); os._exit(3)'
    (tmp_path / "sitecustomize.py").write_text(source)
    with Launcher(env={"PYTHONPATH": str(tmp_path)}) as launcher:
        handle = launcher.run(request(tmp_path, "complete"))
        with pytest.raises(LaunchError, match="exited with code 3"):
            handle.outcome(30)


@pytest.mark.long
def test_closing_leaves_nothing_behind(tmp_path: Path) -> None:
    launcher = Launcher(**ENTRYPOINTS)
    handle = begin(launcher, tmp_path, "stop_when_asked")
    connection = launcher._connection
    assert connection is not None and launcher.pid is not None
    tree = Tree([launcher.pid, *descendants(launcher.pid)])
    launcher.close()
    assert handle.outcome(0).status == "interrupted"
    tree.must_end()
    assert not os.path.exists(connection.folder)


@pytest.mark.long
def test_ranks_of_a_driver_that_died_are_waited_for(tmp_path: Path, launcher: Launcher) -> None:
    """The new driver owns the run at once, but the old ranks have their grace: nobody writes beside them."""
    driver, tree = start_driver(tmp_path, "never_stop")
    driver.kill()
    driver.wait()
    kinds, outcome = finish(launcher, tmp_path, "complete", generation=2)
    assert outcome.status == "complete"
    assert kinds[-1] == "completed"
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["attempt"] for event in events] == sorted(event["attempt"] for event in events)
    assert driver.stdout is not None
    driver.stdout.close()


def test_ranks_of_one_node_listen_on_loopback_only(launcher: Launcher, tmp_path: Path) -> None:
    handle = begin(launcher, tmp_path, "meet")
    pids = [pid for child in children_of(os.getpid()) for _, pid in tree(child)]
    found = set().union(*(listening(pid) for pid in pids))
    handle.interrupt("done")
    assert handle.outcome(60).status == "interrupted"
    assert found and all(each.startswith(("0100007F:", f"{1 << 24:032X}:")) for each in found), found
