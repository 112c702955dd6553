"""An HTTP proxy before a store's endpoint that fails by chance, goes away, or is slow, as a test asks."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

CANARY = "CANARY-9f81c2d7e6b54a30"
"""The secret key of every test on S3: it may turn up nowhere."""
FAULTS = ("500", "503", "reset", "timeout", "lost")
"""What may befall a request: two answers of a server in trouble, a connection that is reset, no answer for
`hang_seconds` and then none at all, an answer that is lost after the server has done what was asked."""
_CODES = {"500": "InternalError", "503": "SlowDown"}
_HOP_BY_HOP = ("connection", "transfer-encoding", "keep-alive", "date", "server", "content-length")


class FaultyProxy:
    """Serves on loopback and hands every request on to `endpoint`, unless it fails it.

    Args:
        endpoint: URL of the real server.
        share: of the requests that fail, each kind in `FAULTS` as likely as the others.
        seed: of the choice. Which request meets which draw depends on their order, which is not seeded.
        hang_seconds: how long a "timeout" keeps the client waiting.
        bytes_per_second: in each direction and connection; None: as fast as it goes.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        share: float = 0.0,
        seed: int = 0,
        hang_seconds: float = 3.0,
        bytes_per_second: float | None = None,
    ) -> None:
        self.endpoint = urlsplit(endpoint)
        self.share = share
        self.hang_seconds = hang_seconds
        self.bytes_per_second = bytes_per_second
        self.seen: Counter[str] = Counter()
        """Requests by what was done to them: "served" or a fault."""
        self.requests: list[tuple[str, str]] = []
        """Method and path of every request that arrived."""
        self.is_away = False
        self.intercept: Callable[[str, str], str | None] = lambda method, path: None
        """Asked about every request, whose fault it returns, or None; it may keep the request as long as it likes."""
        self.refusal: str | None = None
        """Code of the 403 that every request of `refused_methods` meets, such as "AccessDenied"."""
        self.refused_methods: tuple[str, ...] = ("GET", "HEAD", "POST", "PUT", "DELETE")
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._port = 0
        self._listen()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.is_away:
            self._stop_listening()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @contextmanager
    def away(self) -> Iterator[None]:
        """Inside the block new connections are refused, and open ones are reset at their next request."""
        self.leave()
        try:
            yield
        finally:
            self.come_back()

    def reseed(self, seed: int) -> None:
        self._random = random.Random(seed)

    def leave(self) -> None:
        self.is_away = True
        self._stop_listening()

    def come_back(self) -> None:
        self._listen()
        self.is_away = False

    def draw(self, method: str, path: str) -> str | None:
        """The fault of the next request, or None."""
        intercepted = self.intercept(method, path)
        with self._lock:
            self.requests.append((method, path))
            kind = "away" if self.is_away else intercepted
            if kind is None and self.refusal is not None and method in self.refused_methods:
                kind = "refused"
            if kind is None and self._random.random() < self.share:
                kind = self._random.choice(FAULTS)
            self.seen[kind or "served"] += 1
            return kind

    def _listen(self) -> None:
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", self._port), handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def _stop_listening(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: Any, address: Any) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the test output quiet."""

    def handle_any(self) -> None:
        fault = self.proxy.draw(self.command, self.path)
        body = self._paced_read(int(self.headers.get("Content-Length", 0)))
        if fault in ("reset", "away"):
            return self._reset()
        if fault == "timeout":
            time.sleep(self.proxy.hang_seconds)
            return self._reset()
        if fault == "refused":
            return self._complain(403, str(self.proxy.refusal))
        if fault in _CODES:
            return self._complain(int(fault), _CODES[fault])
        status, headers, data = self._hand_on(body)
        if fault == "lost":
            return self._reset()
        self._answer(status, headers, data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def _hand_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        endpoint = self.proxy.endpoint
        connection = http.client.HTTPConnection(str(endpoint.hostname), endpoint.port, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _complain(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
        self._answer(status, [("Content-Type", "application/xml")], text.encode())

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response(status)
        length = str(len(data))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self._paced_write(data)

    def _reset(self) -> None:
        """Ends the connection by a TCP reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def _paced_read(self, length: int) -> bytes:
        pieces = []
        while length > 0 and (piece := self.rfile.read(min(length, self._piece_bytes))):
            pieces.append(piece)
            length -= len(piece)
            self._pace(len(piece))
        return b"".join(pieces)

    def _paced_write(self, data: bytes) -> None:
        for start in range(0, len(data), self._piece_bytes):
            piece = data[start : start + self._piece_bytes]
            self.wfile.write(piece)
            self._pace(len(piece))

    @property
    def _piece_bytes(self) -> int:
        return 1 << 24 if self.proxy.bytes_per_second is None else 1 << 16

    def _pace(self, count: int) -> None:
        if self.proxy.bytes_per_second is not None:
            time.sleep(count / self.proxy.bytes_per_second)
