"""Scripts of a user's own, which call `runner.train()`: signals, exit codes, a debugger."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from danling_core.launch.client import Launcher
from tests.faulty_runner import FAULT
from tests.marks import rarely
from tests.whole_runs import ROOT, fault, launch
from tests.whole_runs import config as whole_config

SCRIPT = """\
import sys, time
from tests.small_runner import SmallRunner, config

class Slow(SmallRunner):
    def after_step(self):
        print("step", self.steps, flush=True)
        time.sleep({sleep})

runner = Slow(config({root!r}, epoch_end=15, params={{"samples": 20}}, **{fields!r}))
runner.train()
print("trained", runner.steps, flush=True)
"""


def start(tmp_path: Path, *, sleep: float = 0.02, launcher: tuple[str, ...] = (), **fields: Any) -> Any:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(root=str(tmp_path / "runs"), fields=fields, sleep=sleep))
    environment = {**os.environ, "PYTHONPATH": ROOT}
    command = [sys.executable, *launcher, str(script)]
    return subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def status(tmp_path: Path) -> dict[str, Any]:
    [file] = (tmp_path / "runs").glob("*/*/status.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, *rarely([signal.SIGUSR1])])
def test_a_signal_saves_and_ends_a_script_with_75(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path)
    for line in process.stdout:
        if line.startswith("step 6"):
            process.send_signal(number)
            break
    out, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert "Traceback" not in error and f"interrupted: got {number.name}" in error and "trained" not in out
    stopped = status(tmp_path)
    assert stopped["status"] == "interrupted" and 6 <= stopped["steps"] < 60
    again = start(tmp_path)
    out, error = again.communicate(timeout=60)
    assert again.returncode == 0 and "trained 60" in out, error
    assert f"step {stopped['steps'] + 1}\n" in out and "step 1\n" not in out
    assert status(tmp_path)["status"] == "complete" and status(tmp_path)["bitwise"]


def test_ctrl_c_saves_before_the_next_step_and_a_second_one_ends_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, sleep=0.3)
    for line in process.stdout:
        if line.startswith("step 2"):
            process.send_signal(signal.SIGINT)
            break
    out, error = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT, error
    assert "once more ends at once" in error and "trained" not in out
    assert status(tmp_path)["status"] == "interrupted" and status(tmp_path)["steps"] in (3, 4)
    process = start(tmp_path, sleep=60.0)
    for line in process.stdout:
        if line.startswith("step"):
            break
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and time.monotonic() - began < 30


@pytest.mark.long
def test_a_time_limit_ends_a_script_with_75(tmp_path: Path) -> None:
    process = start(tmp_path, max_seconds=0.3)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75 and "interrupted: " in error, error


@pytest.mark.long
def test_a_handler_of_the_scripts_own_is_left_alone(tmp_path: Path) -> None:
    process = start(tmp_path)
    script = tmp_path / "train.py"
    process.kill()
    process.communicate()
    own = "import signal\nsignal.signal(signal.SIGUSR1, lambda *_: print('mine', flush=True))\n"
    script.write_text(own + script.read_text())
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": ROOT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout or ():
        if line.startswith("step 2"):
            process.send_signal(signal.SIGUSR1)
            break
    time.sleep(0.3)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert "mine" in out and process.returncode == 75


@pytest.mark.long
def test_a_signal_to_one_rank_of_a_script_stops_all(tmp_path: Path) -> None:
    process = start(
        tmp_path,
        sleep=0.2,
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        nproc_per_node=2,
    )
    for line in process.stdout:
        if line.startswith("step 6"):
            process.terminate()  # torchrun passes it on to both
            break
    process.communicate(timeout=100)
    assert status(tmp_path)["status"] == "interrupted"


# a debugger -------------------------------------------------------------------------------------------------
def run_here(file: Path, *words: str, typed: str, fault: dict[str, Any] | None = None) -> Any:
    environment = {**os.environ, "PYTHONPATH": ROOT, FAULT: json.dumps(fault or {})}
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", "run", str(file), *words],
        input=typed,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.fixture
def two_ranks_file(tmp_path: Path) -> Path:
    file = tmp_path / "run.json"
    file.write_text(whole_config(tmp_path / "runs", epoch_end=1).jsons())
    return file


def _fault(how: str) -> dict[str, Any]:
    return {"how": how, "step": 2, "rank": 0, "place": "train", "attempt": None}


def test_a_breakpoint_opens_in_this_terminal_and_the_run_is_the_same(
    two_ranks_file: Path, tmp_path: Path
) -> None:
    done = run_here(two_ranks_file, "--here", typed="up\np self.steps\nc\n", fault=_fault("breakpoint"))
    assert done.returncode == 0 and "(Pdb)" in done.stdout, done.stderr
    found = status(tmp_path)
    assert (found["status"], found["world_size"], found["bitwise"]) == ("complete", 1, False)
    assert found["not_bitwise"] == "it is trained on 1 rank(s), and the config says 2"


def test_a_debugger_opens_where_an_exception_was_raised(two_ranks_file: Path, tmp_path: Path) -> None:
    done = run_here(two_ranks_file, "--pdb", typed="p place\nq\n", fault=_fault("raise"))
    assert done.returncode == 1 and "'train'" in done.stdout, done.stderr
    assert done.stderr.count("Traceback") == 1 and "danling: ValueError: mine, and told" in done.stderr
    assert status(tmp_path)["status"] == "failed"


def test_launched_ranks_have_no_terminal_for_a_breakpoint(launcher: Launcher, tmp_path: Path) -> None:
    with fault("breakpoint", 2):
        ended = launch(launcher, whole_config(tmp_path, epoch_end=1, max_restarts=0))
    assert ended.outcome is not None and ended.outcome.status == "failed"
    assert "launched ranks have no terminal; `danling run CONFIG --here`" in str(ended.outcome.error)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["epoch_ned=3"], "unknown key 'epoch_ned': did you mean 'epoch_end'?"),
        (["storage_block=aws-credentials/x"], "--here goes without Prefect: set storage_block=null"),
        (["params.widht=3"], "widht"),
    ],
)
def test_bad_input_is_one_message_here_too(
    words: list[str], message: str, two_ranks_file: Path, tmp_path: Path
) -> None:
    done = run_here(two_ranks_file, "--here", *words, typed="")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
