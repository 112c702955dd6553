"""Messages about runs, at a webhook of this machine."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from danling_core.parallel import loopback
from flows.cli import main
from flows.server import why_unreachable
from tests.prefect_fixtures import PrefectServer
from tests.processes import wait_until

Make = Callable[..., dict[str, Any]]


@contextlib.contextmanager
def webhook(status: int = 200) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yield the URL of a webhook on loopback, and what it was sent."""
    messages: list[dict[str, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/token-1234", messages
    finally:
        server.shutdown()


def _automations(server: PrefectServer) -> list[str]:
    with server.client() as client:
        return [each["name"] for each in client.request("POST", "/automations/filter", json={}).json()]


@pytest.mark.long
def test_a_webhook_is_set_changed_and_forgotten_and_its_url_is_a_secret(
    prefect_server: PrefectServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with webhook() as (url, messages):
        assert main(["notify", url]) == 0
        assert messages[0]["subject"] == "danling" and messages[0]["text"].startswith("danling\n")
        names = [name for name in _automations(prefect_server) if name.startswith("danling tells")]
        assert len(names) == 2
        assert main(["notify", url]) == 0 and "changed the automation" in capsys.readouterr().out
        with prefect_server.client() as client:
            shown = client.request("POST", "/block_documents/filter", json={}).text
        assert "token-1234" not in shown
        assert main(["notify", "off"]) == 0
    assert not [name for name in _automations(prefect_server) if name.startswith("danling tells")]


@pytest.mark.parametrize(
    ("status", "url", "code", "said"),
    [
        (500, None, 1, "the webhook does not take a message"),
        (200, "http://127.0.0.1:9/x", 1, "the webhook cannot be reached"),
        (200, "hooks.slack.com/x", 2, "begins with https:// or http://"),
    ],
)
def test_a_webhook_that_takes_nothing_is_refused_and_nothing_is_made(
    prefect_server: PrefectServer,
    capsys: pytest.CaptureFixture[str],
    status: int,
    url: str,
    code: int,
    said: str,
) -> None:
    with webhook(status) as (working, _):
        assert main(["notify", url or working]) == code
    assert said in capsys.readouterr().err
    assert not [name for name in _automations(prefect_server) if name.startswith("danling tells")]


@pytest.mark.long
def test_what_fails_and_what_a_group_came_to_is_sent(toy_config: Make, tmp_path: Path) -> None:
    with loopback.listen(0) as listener:
        port = loopback.address(listener)[1]
    url = f"http://127.0.0.1:{port}/api"
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "home"), "PREFECT_API_URL": url}
    command = [sys.executable, "-m", "flows.cli"]
    root = Path(__file__).parents[2]
    up = subprocess.Popen([*command, "up", "--port", str(port)], cwd=root, env=environment)

    def danling(*words: str) -> int:
        return subprocess.run([*command, *words], cwd=root, env=environment, timeout=100).returncode

    try:
        wait_until(lambda: why_unreachable(url, 2.0) is None, "the server", 100)
        with webhook() as (address, messages):
            assert danling("notify", address) == 0
            for name, params in (("well", {}), ("badly", {"fail_at_epoch": 0})):
                file = tmp_path / f"{name}.json"
                file.write_text(
                    json.dumps(
                        {
                            "config": toy_config(experiment_name=name, params=params),
                            "sweep": {"seed": [0, 1]},
                        }
                    )
                )
                assert danling("experiment", str(file)) == (0 if name == "well" else 2)
            wait_until(lambda: len(messages) >= 5, f"five messages (now {messages})", 60)
    finally:
        up.send_signal(signal.SIGINT)
        up.wait(90)
    subjects = sorted(message["subject"] for message in messages)
    assert subjects == [
        "danling",
        "experiment badly: Failed",
        "experiment well: Completed",
        "run badly-run-seed=0: Failed",
        "run badly-run-seed=1: Failed",
    ]
    [well] = [message["body"] for message in messages if message["subject"].startswith("experiment well")]
    assert "2 runs complete, best well-run-seed=" in well and ", then well-run-seed=" in well
    assert f"http://127.0.0.1:{port}/runs/flow-run/" in well
