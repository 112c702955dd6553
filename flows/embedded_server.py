"""An embedded Prefect server's process: `python -m flows.embedded_server SOCKET_FD`; ends with its parent."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from danling_core.process_tree import END, die_with_parent, ignore_stop_signals


def main() -> None:
    """Serve the API on the listening socket that was inherited as file descriptor `SOCKET_FD`."""
    parent = os.getppid()
    ignore_stop_signals()
    die_with_parent(END)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()  # where the kernel does not
    import uvicorn

    config = uvicorn.Config(
        "flows.server_app:create_app",
        factory=True,
        fd=int(sys.argv[1]),
        log_level="error",
        lifespan="on",
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            async with _alone_at_first():
                await super().startup(sockets)

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Leave it to the process that wants the server when it ends."""
            signal.signal(END, lambda *_: setattr(self, "should_exit", True))
            yield

    Server(config).run()


@contextlib.asynccontextmanager
async def _alone_at_first() -> AsyncIterator[None]:
    """Let one server at a time make the database of a Prefect home: two at once spoil each other's migrations.

    Once one has started with this version of Prefect, nobody waits any more.
    """
    import prefect
    from prefect.settings import PREFECT_HOME

    home = Path(PREFECT_HOME.value())
    done = home / f"danling-started-{prefect.__version__}"
    if done.exists():
        yield
        return
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "danling-first-start", "a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(0.05)
        yield
        done.touch()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), END)


if __name__ == "__main__":
    main()
