"""`danling`: what it prints, what it creates, and its exit codes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from danling_core.runs.finding import list_runs
from danling_core.runs.folder import RunFolder, Status
from flows.cli import main
from tests.marks import rarely
from tests.prefect_fixtures import PrefectServer
from tests.processes import listening, tree, wait_until
from tests.unit.test_identity import RUNNER, git

Make = Callable[..., dict[str, Any]]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], str]:
    """Writes a YAML file and returns its path."""

    def write(values: Any, name: str = "file.yaml") -> str:
        path = tmp_path / name
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return str(path)

    return write


# Bad input: (change of a good config, more words on the command line, what the message says)
BAD_CONFIGS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"epoch_ends": 3}, [], ["epoch_ends", "epoch_end"]),
    ({"epoch_end": "many"}, [], ["epoch_end", "many"]),
    ({"step_end": 10}, [], ["epoch_end", "step_end"]),
    ({}, ["params.widht=3"], ["widht", "width"]),
    ({}, ["sed=3"], ["sed", "seed"]),
    ({}, ["seed"], ["seed"]),
    ({}, ["--fresh", "sed=3"], ["sed", "seed"]),
    ({}, ["params.lr=1e-3,3e-3"], ["--sweep params.lr=1e-3,3e-3", "[1e-3,3e-3]"]),
    ({"params": {"width": "wide"}}, [], ["width", "wide"]),
    ({"runner": "tests.toy_runner:NoSuchRunner"}, [], ["NoSuchRunner"]),
]
RARER_BAD_CONFIGS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"runner": "tests.no_such_module:Runner"}, [], ["tests.no_such_module"]),
    ({"runner": None}, [], ["runner"]),
]


@pytest.mark.parametrize(("changes", "words", "said"), [*BAD_CONFIGS, *rarely(RARER_BAD_CONFIGS)])
def test_bad_input_is_one_message_exit_2_and_nothing_created(
    changes: dict[str, Any],
    words: list[str],
    said: list[str],
    prefect_server: PrefectServer,
    toy_config: Make,
    write: Callable[[Any], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write(toy_config(**changes))
    assert main(["run", file, *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("danling: ") and "Traceback" not in captured.err
    for part in said:
        assert part in captured.err
    assert os.listdir(tmp_path) == ["file.yaml"]


def test_a_missing_file_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "no/such/file.yaml"]) == 2
    assert "no/such/file.yaml" in capsys.readouterr().err


@pytest.mark.long
def test_a_sweep_over_an_unknown_parameter_is_bad_input(
    prefect_server: PrefectServer,
    toy_config: Make,
    write: Callable[[Any], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = {"config": toy_config(), "sweep": {"params.widht": [1, 2]}}
    assert main(["experiment", write(spec)]) == 2
    assert "width" in capsys.readouterr().err
    group = {"group": "g", "experiments": [{"config": toy_config()}, {**spec, "sweep": {"sed": [1, 2]}}]}
    assert main(["group", write(group)]) == 2
    assert "seed" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["file.yaml"]


@pytest.mark.parametrize("command", ["experiment", "group"])
def test_several_values_outside_of_a_sweep_are_refused_for_every_run(
    command: str, toy_config: Make, write: Callable[[Any], str], capsys: pytest.CaptureFixture[str]
) -> None:
    spec: dict[str, Any] = {"config": toy_config()}
    file = write(spec if command == "experiment" else {"group": "g", "experiments": [spec]})
    assert main([command, file, "params.lr=1e-3,3e-3"]) == 2
    assert main([command, file, "params.opt=adam,sgd"]) == 2
    said = capsys.readouterr().err
    assert "--sweep params.lr=1e-3,3e-3" in said and """params.lr='"1e-3,3e-3"'""" in said


@pytest.mark.parametrize(
    "words", [["fly"], ["run"], ["show", "--root"], [], ["run", "x.yaml", "--quick"], ["show", "a", "seed=1"]]
)
def test_a_wrong_command_line_is_bad_input(words: list[str]) -> None:
    assert main(words) == 2


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["group", "--help"], ["runs", "--help"]])
def test_help_has_examples(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert "examples:" in capsys.readouterr().out


def test_keys_lists_what_a_config_may_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys"]) == 0
    printed = capsys.readouterr().out
    for key in ("epoch_end = null", "dataloader.batch_size = 32", "optim = null"):
        assert f"\n{key}\n    " in printed
    assert "optim.name = (required where optim is given)" in printed
    assert "KEY" not in "".join(line for line in printed.splitlines() if " = " in line)
    assert main(["keys", "no such thing"]) == 2


@pytest.mark.long
def test_a_run_is_swept_from_the_command_line_resumed_and_begun_anew(
    prefect_server: PrefectServer,
    toy_config: Make,
    write: Callable[[Any], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, file = toy_config()["project_root"], write(toy_config())
    words = [
        "experiment",
        file,
        "--sweep",
        "params.lr=0.1,0.2",
        "epoch_end=1",
        "--sweep",
        "seed=0,1",
        "--verbose",
    ]
    assert main(words) == 0
    assert "[4/4]" in capsys.readouterr().out
    assert main([*words, "--fresh"]) == 0
    assert "complete already" not in capsys.readouterr().out
    assert main(["runs", root, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 8 and len({row["id"] for row in rows}) == 4
    assert {row["epochs"] for row in rows} == {1} and "toy-run-lr=0.2-seed=1" in {row["name"] for row in rows}
    stamps = [row["timestamp"] for row in rows]
    assert stamps == sorted(stamps, reverse=True)
    assert rows[0]["date"][:10].replace("-", "") == stamps[0][:8]


@pytest.mark.long
def test_a_copy_is_resumed_by_hand_where_it_lies(
    prefect_server: PrefectServer,
    toy_config: Make,
    write: Callable[[Any], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = toy_config()
    assert main(["run", write(config)]) == 0
    [(folder, status)] = list_runs(config["project_root"])
    assert status is not None
    copies = str(tmp_path / "copies")
    assert main(["pull", folder.url, copies]) == 0
    capsys.readouterr()
    assert main(["show", folder.url]) == 0
    assert "project_root=" not in capsys.readouterr().out
    assert main(["show", status.id, "--root", copies]) == 0
    by_hand = capsys.readouterr().out.splitlines()[-1]
    assert by_hand.endswith(f"/config.yaml project_root={copies}")
    done = subprocess.run(
        [sys.executable, "-m", *by_hand.split()[4:]], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and f"{copies}/" in done.stderr and "is complete" in done.stderr


@pytest.mark.long
def test_a_metric_that_no_split_reports_fails_at_the_first_result_and_names_the_known_ones(
    prefect_server: PrefectServer,
    toy_config: Make,
    write: Callable[[Any], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = toy_config(score_name="accurracy", score_mode="max", sanity_batches=0)
    assert main(["run", write(config)]) == 1
    error = capsys.readouterr().err
    assert "accurracy" in error and "accuracy" in error and "loss" in error
    [(_, status)] = list_runs(config["project_root"])
    assert status is not None and status.status == "failed"


@pytest.mark.long
def test_what_keeps_a_run_from_being_opened_is_said(
    prefect_server: PrefectServer,
    toy_config: Make,
    write: Callable[[Any], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write(toy_config(dir=str(tmp_path / "out")))
    assert main(["run", file, "seed=0"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["run", file, "seed=1"]) == 2
    assert "name another dir" in capsys.readouterr().err
    scratch = toy_config(project_root="memory://scratch", scratch=f"{file}/below")
    assert main(["run", write(scratch, "scratch.yaml")]) == 1
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.long
def test_ctrl_c_while_a_finished_session_closes_does_not_undo_the_run(
    prefect_server: PrefectServer,
    toy_config: Make,
    write: Callable[[Any], str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flows.pool import LauncherPool

    close = LauncherPool.close

    def interrupted_close(pool: LauncherPool) -> None:
        close(pool)
        raise KeyboardInterrupt

    monkeypatch.setattr(LauncherPool, "close", interrupted_close)
    assert main(["run", write(toy_config())]) == 0
    assert capsys.readouterr().err == ""


def test_runs_and_show_read_what_a_group_left(
    prefect_server: PrefectServer,
    toy_config: Make,
    write: Callable[[Any], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = toy_config()["project_root"]
    runs = [{"seed": 0}, {"params.fail_at_epoch": 1}]
    file = write({"group": "both", "concurrency": 2, "experiments": [{"config": toy_config(), "runs": runs}]})
    assert main(["group", file]) == 1
    first = capsys.readouterr()
    assert "Leaderboard of both" in first.out and "[2/2]" in first.out
    assert first.err.rstrip().splitlines()[-1].startswith("ValueError")
    assert main(["runs", root, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert sorted(row["status"] for row in rows) == ["complete", "failed"]
    assert main(["runs", root, "--status", "failed", "--group", "both"]) == 0
    assert "fail_at_epoch" in capsys.readouterr().out
    assert main(["runs", root, "--group", "other"]) == 0
    assert "no runs" in capsys.readouterr().out
    [complete] = [row for row in rows if row["status"] == "complete"]
    assert main(["show", complete["id"][:12], "--root", root]) == 0
    shown = capsys.readouterr().out
    assert complete["folder"] in shown and "accuracy" in shown and "results.json" in shown
    assert main(["show", "nothing", "--root", root]) == 2


@pytest.mark.long
def test_a_finished_group_is_skipped_whole_though_a_stray_file_lies_beside_its_runner(
    prefect_server: PrefectServer,
    toy_config: Make,
    write: Callable[[Any], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "mine.py").write_text(RUNNER)
    git(code, "init", "-q")
    git(code, "add", ".")
    git(code, "commit", "-q", "-m", "one")
    shared = toy_config(runner=f"{code}/mine.py:Mine", score_name="loss")
    swept = {"config": shared, "sweep": {"seed": [0, 1]}}
    other = {"config": {**shared, "experiment_name": "other", "epoch_end": 1}}
    file = write({"group": "g", "concurrency": 2, "experiments": [swept, other]})

    def stamps() -> dict[str, int]:
        runs = Path(shared["project_root"])
        return {str(path): path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}

    assert main(["group", file]) == 0
    first, before = capsys.readouterr().out, stamps()
    assert "complete already" not in first and "[3/3]" in first
    (code / "stray.py").write_text("x = 1\n")
    assert main(["group", file]) == 0
    second = capsys.readouterr().out
    assert second.count("complete already") == 3 and stamps() == before
    statuses = [status for _, status in list_runs(shared["project_root"])]
    commit = git(code, "rev-parse", "HEAD")
    assert [status and (status.status, status.experiment_id) for status in statuses] == [
        ("complete", commit)
    ] * 3


def test_a_folder_with_nothing_but_a_status_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(str(tmp_path / "mine"))
    folder.write_status(Status(status="failed", name="toy-mine", id="e" * 16, timestamp="mine"))
    assert main(["show", folder.url]) == 0
    shown = capsys.readouterr().out
    assert "toy-mine" in shown and "status.json" in shown
    assert "date" not in shown and "by hand" not in shown


def _danling(server: PrefectServer, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *words],
        cwd=ROOT,
        env=server.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _has_told(glob: Callable[[str], Iterable[Path]], event: str) -> bool:
    return any(event in path.read_text() for path in glob("*/*/events.jsonl"))


def _processes_naming(text: str) -> list[str]:
    """Command lines and environments of the processes alive that mention `text`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and text.encode() in (path / "environ").read_bytes():
                found.append(f"{path.name} {(path / 'cmdline').read_text()}")
        except (OSError, IndexError):
            continue
    return [line for line in found if not line.startswith(f"{os.getpid()} ")]


def _marked(server: PrefectServer, tmp_path: Path) -> tuple[PrefectServer, str]:
    """The server with a mark in the environment, by which every process of a command is known."""
    mark = f"DANLING_TEST={tmp_path}"
    return PrefectServer(server.api_url, {**server.environment, "DANLING_TEST": str(tmp_path)}), mark


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops_and_the_same_command_resumes(
    number: signal.Signals,
    code: int,
    prefect_server: PrefectServer,
    toy_config: Make,
    write: Callable[[Any], str],
    tmp_path: Path,
) -> None:
    server, mark = _marked(prefect_server, tmp_path)
    config = toy_config(epoch_end=40, nproc_per_node=2, params={"sleep_seconds": 0.05})
    words = ["run", write(config)]
    process = _danling(server, *words)
    events = (tmp_path / "experiments").glob
    wait_until(lambda: _has_told(events, "epoch_finished"), "epoch_finished")
    os.killpg(process.pid, number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert "to resume: danling run" in error
    wait_until(lambda: not _processes_naming(mark), f"the end of {mark}", 15)
    [(folder, status)] = list_runs(config["project_root"])
    assert status is not None and status.status == "interrupted" and 0 < status.epochs < 40
    again = _danling(server, *words, "params.sleep_seconds=0.05")
    out, error = again.communicate(timeout=90)
    assert again.returncode == 0, error
    assert "resumed" in out and folder.url in out
    printed = re.findall(r"epoch +(\d+)/40", out)
    assert printed[0] == str(status.epochs), "it goes on with the first epoch that was not finished"


@pytest.mark.long
def test_an_interrupted_sweep_says_which_runs_the_resume_command_does_not_begin_anew(
    prefect_server: PrefectServer, toy_config: Make, write: Callable[[Any], str], tmp_path: Path
) -> None:
    config = toy_config(epoch_end=40, params={"sleep_seconds": 0.05})
    process = _danling(prefect_server, "experiment", write(config), "--fresh", "--sweep", "seed=0,1,2")
    events = (tmp_path / "experiments").glob
    wait_until(lambda: _has_told(events, "epoch_finished"), "epoch_finished")
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    [resume, left] = error.strip().splitlines()[-2:]
    assert "to resume: danling experiment" in resume and "--fresh" not in resume
    begun = {folder.url.split("/")[-2].rpartition("-")[0] for folder, _ in list_runs(config["project_root"])}
    for name in ("toy-run-seed=0", "toy-run-seed=1", "toy-run-seed=2"):
        assert (name in left) == (name not in begun)


def test_a_rank_that_raises_fails_the_run_with_its_traceback_last_and_leaves_no_process(
    prefect_server: PrefectServer, toy_config: Make, write: Callable[[Any], str], tmp_path: Path
) -> None:
    server, mark = _marked(prefect_server, tmp_path)
    config = toy_config(nproc_per_node=2, params={"fail_at_epoch": 1, "fail_rank": 1})
    process = _danling(server, "run", write(config))
    _, error = process.communicate(timeout=90)
    assert process.returncode == 1
    assert error.startswith("danling: ")
    assert "Traceback (most recent call last)" in error and "toy_runner.py" in error
    assert error.rstrip().splitlines()[-1].startswith("ValueError")
    wait_until(lambda: not _processes_naming(mark), f"the end of {mark}", 15)


@pytest.mark.long
def test_what_a_rank_refuses_before_its_first_step_is_one_message_and_bad_input(
    prefect_server: PrefectServer, toy_config: Make, write: Callable[[Any], str], tmp_path: Path
) -> None:
    config = toy_config(nproc_per_node=2, score_name="nonsense", score_mode="max")
    process = _danling(prefect_server, "run", write(config))
    _, error = process.communicate(timeout=90)
    assert process.returncode == 2 and "Traceback" not in error
    first, second = error.splitlines()
    assert "score_name is 'nonsense', but split 'val' reports ['accuracy', 'loss']" in first
    assert "--verbose" in second


@pytest.mark.long
@pytest.mark.holds("system-2")
def test_the_embedded_server_serves_without_configuration_and_ends_with_the_command(
    toy_config: Make, write: Callable[[Any], str], tmp_path: Path, prefect_home: Path
) -> None:
    environment = {**os.environ, "PREFECT_HOME": str(prefect_home)}
    server, mark = _marked(PrefectServer("", environment), tmp_path)
    process = _danling(server, "run", write(toy_config()))
    assert _stranger_gets(process.pid) == 401
    out, error = process.communicate(timeout=110)
    assert process.returncode == 0, error
    assert "complete" in out and error == ""
    wait_until(lambda: not _processes_naming(mark), f"the end of {mark}", 15)
    import sqlite3

    with sqlite3.connect(prefect_home / "prefect.db") as database:
        found = database.execute("select name from task_run where state_type = 'COMPLETED'").fetchall()
    names = {name for (name,) in found}
    assert {"seed-0", "epoch-0", "epoch-1", "evaluate", "score", "store"} <= names
    again = _danling(server, "run", write(toy_config()))
    out, error = again.communicate(timeout=110)
    assert again.returncode == 0 and error == ""
    assert "complete already" in out
    with sqlite3.connect(prefect_home / "prefect.db") as database:
        assert database.execute("select count(*) from flow_run").fetchone() == (1,)


@pytest.mark.long
@pytest.mark.timeout(300)  # three servers, one after the other, and a database to be made
def test_first_commands_at_once_share_a_fresh_prefect_home(toy_config: Make, tmp_path: Path) -> None:
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "home")}
    processes = []
    for seed in range(3):
        file = tmp_path / f"{seed}.yaml"
        file.write_text(json.dumps(toy_config(seed=seed)))
        processes.append(_danling(PrefectServer("", environment), "run", str(file)))
    for process in processes:
        _, error = process.communicate(timeout=280)
        assert process.returncode == 0 and error == ""


def _stranger_gets(pid: int) -> int:
    """Ask the embedded server of a command for its flow runs, as any process of this machine can."""

    def ports() -> list[int]:
        found = (listening(child) for _, child in tree(pid))
        return [int(each.partition(":")[2], 16) for each in set().union(*found)]

    def ask() -> int:
        for port in ports():
            with contextlib.suppress(urllib.error.URLError, http.client.HTTPException, OSError):
                request = urllib.request.Request(f"http://127.0.0.1:{port}/api/flow_runs/count", data=b"{}")
                try:
                    with urllib.request.urlopen(request, timeout=5) as answer:
                        return int(answer.status)
                except urllib.error.HTTPError as error:
                    return error.code
        return 0

    wait_until(lambda: ask() != 0, "an answer of the embedded server")
    return ask()


@pytest.mark.long
def test_a_configured_api_that_cannot_be_reached_is_named_and_done_without(
    toy_config: Make, write: Callable[[Any], str], prefect_home: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        api_url = f"http://127.0.0.1:{closed.getsockname()[1]}/api"
    environment = {**os.environ, "PREFECT_HOME": str(prefect_home), "PREFECT_API_URL": api_url}
    process = _danling(PrefectServer(api_url, environment), "run", write(toy_config()))
    out, error = process.communicate(timeout=110)
    assert process.returncode == 0, error
    assert "complete" in out
    [line] = error.splitlines()
    assert api_url in line and "refused" in line and "prefect config unset PREFECT_API_URL" in line


@pytest.mark.long
def test_an_api_that_wants_a_password_is_done_without(
    toy_config: Make, write: Callable[[Any], str], prefect_home: Path, tmp_path: Path
) -> None:
    from flows.server import EmbeddedServer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(prefect_home))
        closed = EmbeddedServer(auth="me:secret")
        closed.start()
    try:
        own = {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_API_URL": closed.wait()}
        server = PrefectServer(closed.api_url, {**os.environ, **own})
        refused = _danling(server, "deploy", write(toy_config()))
        _, error = refused.communicate(timeout=60)
        assert refused.returncode == 2 and len(error.splitlines()) == 1
        assert "401" in error and "PREFECT_API_AUTH_STRING" in error and not (ROOT / "prefect.yaml").exists()
        trained = _danling(server, "run", write(toy_config()))
        out, error = trained.communicate(timeout=110)
        assert trained.returncode == 0 and "complete" in out, error
        [line] = error.splitlines()
        assert closed.api_url in line and "401" in line and "a server of this command's own" in line
    finally:
        closed.stop()


@pytest.mark.long
def test_modules_of_the_users_folder_do_not_shadow_those_of_the_server_and_the_launcher(
    toy_config: Make, write: Callable[[Any], str], tmp_path: Path, prefect_home: Path
) -> None:
    folder = tmp_path / "project"
    (folder / "flows").mkdir(parents=True)
    for name in ("flows/__init__.py", "secrets.py"):
        (folder / name).write_text("raise ImportError('this is the module of the user')\n")
    environment = {**os.environ, "PREFECT_HOME": str(prefect_home), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "flows.cli", "run", write(toy_config())],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert "complete" in done.stdout and done.stderr == ""


@pytest.mark.long
def test_a_second_ctrl_c_kills_at_once_and_what_was_saved_is_still_there(
    prefect_server: PrefectServer, toy_config: Make, write: Callable[[Any], str], tmp_path: Path
) -> None:
    server, mark = _marked(prefect_server, tmp_path)
    config = toy_config(epoch_end=40, nproc_per_node=2, stop_grace_seconds=600, params={"sleep_seconds": 2.0})
    process = _danling(server, "run", write(config))
    events = (tmp_path / "experiments").glob
    wait_until(lambda: _has_told(events, "epoch_began"), "epoch_began")
    os.killpg(process.pid, signal.SIGINT)
    assert process.stderr is not None and "stopping" in (
        process.stderr.readline() + process.stderr.readline()
    )
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    wait_until(lambda: not _processes_naming(mark), f"the end of {mark}", 15)
    [(folder, _)] = list_runs(config["project_root"])
    assert main(["show", folder.url]) == 0


@pytest.mark.long
def test_a_prefect_api_that_goes_away_in_the_middle_costs_no_epoch_and_no_result(
    toy_config: Make, write: Callable[[Any], str], tmp_path: Path, prefect_home: Path
) -> None:
    from flows.server import EmbeddedServer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(prefect_home))
        embedded = EmbeddedServer()
        embedded.start()
    api_url = embedded.wait()
    config = toy_config(epoch_end=60, params={"sleep_seconds": 0.05})
    environment = {**os.environ, "PREFECT_HOME": str(prefect_home), "PREFECT_API_URL": api_url}
    process = _danling(PrefectServer(api_url, environment), "run", write(config))
    events = (tmp_path / "experiments").glob
    wait_until(lambda: _has_told(events, "epoch_finished"), "epoch_finished")
    embedded.stop()
    out, error = process.communicate(timeout=110)
    assert process.returncode == 0, error
    assert "complete" in out and "went away" in error
    [(_, status)] = list_runs(config["project_root"])
    assert status is not None and status.is_complete and status.epochs == 60


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["runs", "no-such-root"], ["show", "nothing"], ["run", "--help"]]
)
def test_listing_and_help_load_neither_prefect_nor_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom flows.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "sys.exit(' '.join(sorted({'prefect', 'torch'} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["tasks.py", "flows.py", "flows/__init__.py"])
def test_a_module_that_hides_ours_is_refused_by_name_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine = True\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "danling_entry", "runs"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert str(tmp_path / name) in done.stderr and "Rename" in done.stderr


def test_a_folder_of_the_users_that_hides_our_package_is_named(tmp_path: Path) -> None:
    """As beside an editable install, whose finder comes after the folders that Python looks through."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "installed").mkdir()
    for name in ("danling_entry.py", "danling_core", "flows"):
        (tmp_path / "installed" / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{tmp_path / 'installed'}"}
    done = subprocess.run(
        [sys.executable, "-P", "-S", "-m", "danling_entry", "runs"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert str(tmp_path / "tasks") in done.stderr and "Rename" in done.stderr
