"""The API that we serve has patience with a busy database, so that its clients need none."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from flows import server_app
from flows.server_app import trying_again

RETRIED = [(b"retry-after", b"0.05")]


class App:
    """Answers with these statuses in turn, as Starlette does: what it answers with an error, it raises as well."""

    def __init__(self, *statuses: int) -> None:
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        self._statuses = list(statuses)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])
        scope["path"] = "changed, as a router does"
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        self.bodies.append(b"".join(message["body"] for message in messages))
        status = self._statuses.pop(0) if len(self._statuses) > 1 else self._statuses[0]
        await send({"type": "http.response.start", "status": status, "headers": [(b"Retry-After", b"9")]})
        await send({"type": "http.response.body", "body": str(status).encode()})
        if status >= 500:
            raise OSError("database is locked")


def _sent(app: App, method: str = "POST") -> list[Any]:
    """Ask for something in two parts; what was answered."""
    parts = [{"body": b"one ", "more_body": True}, {"body": b"two", "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        return parts.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": "/flow_runs/"}
    asyncio.run(trying_again(app)(scope, receive, send))
    return sent


def test_a_request_that_meets_a_busy_database_is_made_again_as_it_was() -> None:
    app = App(503, 503, 201)
    start, body = _sent(app)
    assert (start["status"], body["body"]) == (201, b"201")
    assert app.bodies == [b"one two"] * 3 and app.paths == ["/flow_runs/"] * 3


def test_a_database_that_stays_busy_is_said_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_app, "_REQUEST_SECONDS", 0.1)
    app = App(503)
    with pytest.raises(OSError, match="locked"):
        _sent(app)
    assert len(app.bodies) > 2


def test_what_is_no_lock_is_passed_on_at_once() -> None:
    app = App(500)
    with pytest.raises(OSError, match="locked"):
        _sent(app)
    assert len(app.bodies) == 1
    start, _ = _sent(App(200), "GET")
    assert start["headers"] == [(b"Retry-After", b"9")]


def test_the_last_answer_of_a_busy_database_asks_to_come_back_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_app, "_REQUEST_SECONDS", -1.0)

    class Quiet(App):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await super().__call__(scope, receive, send)
            except OSError:
                return

    start, _ = _sent(Quiet(503))
    assert start["status"] == 503 and start["headers"] == RETRIED


def test_requests_that_write_wait_for_each_other_and_those_that_read_do_not() -> None:
    at_once = {"POST": 0, "GET": 0}
    most = dict(at_once)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        method = scope["method"]
        at_once[method] += 1
        most[method] = max(most[method], at_once[method])
        await asyncio.sleep(0.01)
        at_once[method] -= 1

    async def receive() -> Any:
        return {"body": b"", "more_body": False}

    async def all_at_once() -> None:
        served = trying_again(app)
        scopes = [{"type": "http", "method": method, "path": "/"} for method in ("POST", "GET") * 4]
        await asyncio.gather(*(served(scope, receive, None) for scope in scopes))

    asyncio.run(all_at_once())
    assert most == {"POST": 1, "GET": 4}
