"""Prefect's API as an ASGI app that has patience with a busy SQLite database, where its clients have none."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

_TRANSACTION_SECONDS = 1.0
_REQUEST_SECONDS = 10.0
_PAUSE_SECONDS = 0.02
_RETRY_AFTER = (b"retry-after", b"0.05")
_READS = ("/filter", "/filter_minimal", "/count", "/history", "/paginate")


def create_app() -> Any:
    """Return Prefect's app, as uvicorn wants it."""
    from prefect.server.api import server

    _give_up_early()
    _count_requests_only()
    return trying_again(server.create_app())


def _give_up_early() -> None:
    """Have a transaction wait `_TRANSACTION_SECONDS` for SQLite's lock, where Prefect's own waits a minute.

    Two connections of one server can wait for each other, and a client sees all of it.
    """
    from prefect.server.database import dependencies
    from prefect.server.database.configurations import AioSqliteConfiguration

    class Configuration(AioSqliteConfiguration):
        def setup_sqlite(self, conn: Any, record: Any) -> None:
            super().setup_sqlite(conn, record)
            cursor = conn.cursor()
            cursor.execute(f"PRAGMA busy_timeout = {int(_TRANSACTION_SECONDS * 1000)};")
            cursor.close()

    prefects = dependencies.provide_database_interface().database_config
    if isinstance(prefects, AioSqliteConfiguration):
        dependencies.MODELS_DEPENDENCIES["database_config"] = Configuration(prefects.connection_url)


def _count_requests_only() -> None:
    """Have the 100 requests that Prefect handles at a time over SQLite be requests, and no websockets.

    A worker holds two websockets open for each flow run at work: 50 of them, and Prefect's own app would answer nobody
    any more, not even whether it is healthy.
    """
    from prefect.server.api import server

    class Limit(server.RequestLimitMiddleware):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "websocket":
                await self.app(scope, receive, send)
            else:
                await super().__call__(scope, receive, send)

    server.RequestLimitMiddleware = Limit  # type: ignore[misc]


def trying_again(app: Any) -> Any:
    """Return an ASGI app that answers 503 only when `app` has done so for `_REQUEST_SECONDS`.

    Prefect answers 503 where SQLite is locked, which is for milliseconds, and its clients then wait 2, 4, 8, 16 and
    32 s. What is answered 503 was rolled back, so it can be done again here. Requests that write wait for each other:
    at the same time they would fail each other.
    """
    writing = asyncio.Lock()

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        end = time.monotonic() + _REQUEST_SECONDS
        request = await _messages(receive)
        while True:
            answered = _Answer(send, is_last=time.monotonic() > end)
            async with writing if _writes(scope) else contextlib.nullcontext():
                try:
                    await app({**scope}, _giving(request, receive), answered.send)
                except Exception:  # Starlette raises what it has answered for
                    if not answered.is_held_back:
                        raise
            if not answered.is_held_back:
                return
            await asyncio.sleep(_PAUSE_SECONDS)

    return answer


class _Answer:
    """Answer of an app, which is passed on: one of 503 only where it is the last."""

    def __init__(self, send: Any, is_last: bool) -> None:
        self.is_held_back = False
        self._send = send
        self._is_last = is_last

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start" and message["status"] == 503:
            self.is_held_back = not self._is_last
            kept = [each for each in message.get("headers", []) if each[0].lower() != _RETRY_AFTER[0]]
            message = {**message, "headers": [*kept, _RETRY_AFTER]}
        if not self.is_held_back:
            await self._send(message)


def _writes(scope: Any) -> bool:
    return scope["method"] not in ("GET", "HEAD", "OPTIONS") and not scope["path"].endswith(_READS)


async def _messages(receive: Any) -> list[Any]:
    """Return the messages of a request, to its end."""
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    return messages


def _giving(messages: list[Any], receive: Any) -> Any:
    """Return a `receive` that gives these messages first."""
    waiting = list(reversed(messages))

    async def receive_again() -> Any:
        return waiting.pop() if waiting else await receive()

    return receive_again
