"""What lies beside training decides nothing: the console, the proxy, the API, the home."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.cli import main
from flows.home import a_home, never_through_a_proxy
from flows.server import why_refused, why_unreachable

# the console


PRINTS = """
import sys
from danling_core.writers.console import survive_a_closed_console
survive_a_closed_console()
for number in range(20_000):
    print("line", number, "\u2192 \U0001f600", flush=number % 100 == 0)
sys.stdout.flush()
open(sys.argv[1], "w").write("trained on")
"""


@pytest.mark.parametrize("kind", ["closed pipe", "full disk", "ascii"])
def test_a_console_that_takes_nothing_stops_nobody(tmp_path: Path, kind: str) -> None:
    done = tmp_path / "done"
    words = [sys.executable, "-c", PRINTS, str(done)]
    environment = {**os.environ, **({"PYTHONIOENCODING": "ascii"} if kind == "ascii" else {})}
    if kind == "full disk":
        with open("/dev/full", "w") as full:
            ended = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, timeout=60, env=environment)
    elif kind == "ascii":
        ended = subprocess.run(words, capture_output=True, timeout=60, env=environment)
        assert b"\\u2192" in ended.stdout
    else:
        reader, writer = os.pipe()
        os.close(reader)
        ended = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, timeout=60, env=environment)
        os.close(writer)
    assert ended.returncode == 0 and done.read_text() == "trained on", ended.stderr


# the machine


IPV6_ONLY = "ip link set lo up && ip addr del 127.0.0.1/8 dev lo"
TINY_SHM = "mount -t tmpfs -o size=64k none /dev/shm"
READ_ONLY_SHM = "mount -t tmpfs -o ro none /dev/shm"


def run_where(kind: str, setup: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run `danling run` on two ranks with two loader workers in a namespace of its own."""
    if os.geteuid() != 0 or subprocess.run(["unshare", kind, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs the right to make namespaces")
    file = tmp_path / "run.yaml"
    file.write_text(
        "runner: tests.toy_runner:ToyRunner\nepoch_end: 1\nnproc_per_node: 2\nparams: {samples: 20}\n"
        f"dataloader: {{num_workers: 2}}\nproject_root: {tmp_path / 'experiments'}\n"
    )
    danling = Path(sys.executable).with_name("danling")
    script = f'{setup} && exec "{danling}" run "{file}"'
    words = ["unshare", kind, "sh", "-c", script]
    root = Path(__file__).parents[2]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=root)


@pytest.mark.long
def test_a_machine_that_has_ipv6_only_trains(tmp_path: Path) -> None:
    ended = run_where("--net", IPV6_ONLY, tmp_path)
    assert ended.returncode == 0 and "complete: " in ended.stdout, ended.stderr


@pytest.mark.long
@pytest.mark.parametrize(("setup", "word"), [(TINY_SHM, "full"), (READ_ONLY_SHM, "read-only")])
def test_shared_memory_that_is_full_or_read_only_is_named(tmp_path: Path, setup: str, word: str) -> None:
    ended = run_where("--mount", setup, tmp_path)
    assert ended.returncode != 0
    assert f"the shared memory /dev/shm is {word}" in ended.stderr and "--shm-size" in ended.stderr


# the proxy and the API


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    """A server that answers `/CODE/...` with that code."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(self.path.split("/")[1]))
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


@pytest.mark.parametrize("code", [200, 204, 401, 404, 500, 503])
def test_anything_but_a_healthy_answer_is_away_and_no_proxy_is_asked(
    server: http.server.ThreadingHTTPServer, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("NO_PROXY", "example.org")
    never_through_a_proxy()
    reason = why_unreachable(f"http://127.0.0.1:{server.server_port}/{code}")
    assert (reason is None) == (code == 200)
    assert reason is None or str(code) in reason
    assert os.environ["no_proxy"].startswith("example.org,127.0.0.1")


@pytest.mark.parametrize(("code", "is_let_in"), [(200, True), (404, True), (401, False), (403, False)])
def test_an_api_that_wants_a_password_says_so(
    server: http.server.ThreadingHTTPServer, code: int, is_let_in: bool
) -> None:
    reason = why_refused(f"http://127.0.0.1:{server.server_port}/{code}")
    assert (reason is None) == is_let_in
    assert is_let_in or (reason is not None and str(code) in reason and "PREFECT_API_AUTH_STRING" in reason)


def test_a_command_that_prefect_refuses_something_says_it_in_one_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200 if self.path.endswith("/health") else 404)

        def do_POST(self) -> None:
            self.answer(500)

        def answer(self, code: int) -> None:
            self.send_response(code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{found.server_port}/api"}):
            assert main(["approve"]) == 1
        found.shutdown()
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("danling: the Prefect API: ") and "500" in line


# the home


@pytest.mark.parametrize("home", ["/proc/none", "/dev/null", None])
def test_a_home_that_cannot_be_written_is_replaced_for_the_command(
    home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("PREFECT_HOME", "/proc/none/.prefect" if home is None else f"{home}/.prefect")
    monkeypatch.setenv("HOME", home or "/proc/none")
    with a_home():
        found = Path(os.environ["PREFECT_HOME"])
        assert found.parent == tmp_path and os.environ["HOME"] == str(found)
        (found / "file").touch()
    assert "cannot be written" in caplog.text and not found.exists()


def test_a_home_that_can_be_written_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "mine"))
    with a_home():
        assert os.environ["PREFECT_HOME"] == str(tmp_path / "mine")
