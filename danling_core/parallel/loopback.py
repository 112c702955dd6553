"""The machine's own address: 127.0.0.1, or ::1 where there is no other."""

from __future__ import annotations

import errno
import socket


def listen(port: int = 0) -> socket.socket:
    """Return a socket that listens on the machine's own address, on a free port or `port`."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise
        return socket.create_server(("::1", port), family=socket.AF_INET6)


def address(listener: socket.socket) -> tuple[str, int]:
    """Return host and port of a socket that `listen` made."""
    host, port = listener.getsockname()[:2]
    return str(host), int(port)
