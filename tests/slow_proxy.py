"""A TCP proxy on loopback that holds up the requests which begin as it is told."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator


class SlowProxy:
    """Passes all on to a port of this machine; see `slow_proxy`."""

    def __init__(self, port: int) -> None:
        self.beginning = b"nothing"
        self.seconds = 0.0
        self.passed_first = 0
        """How many such requests are not held up."""
        self.held_up = 0
        self.is_away = False
        """Whether nothing is passed on any more."""
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.is_away:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._target))
                for source, sink, is_request in ((client, server, True), (server, client, False)):
                    threading.Thread(
                        target=self._pass_on, args=(source, sink, is_request), daemon=True
                    ).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, is_request: bool) -> None:
        with contextlib.suppress(OSError):
            while (data := source.recv(65536)) and not self.is_away:
                if is_request and data.startswith(self.beginning):
                    if self.passed_first == 0:
                        self.held_up += 1
                        time.sleep(self.seconds)
                    self.passed_first = max(0, self.passed_first - 1)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def slow_proxy(port: int) -> Iterator[SlowProxy]:
    """Yield a proxy to a port of this machine."""
    proxy = SlowProxy(port)
    try:
        yield proxy
    finally:
        proxy.close()
