"""An embedded Prefect server's process: `python -m flows.embedded_server SOCKET_FD`; ends with its parent."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from danling_core.process_tree import die_with_parent


def main() -> None:
    """Serve the API on the listening socket that was inherited as file descriptor `SOCKET_FD`."""
    parent = os.getppid()
    die_with_parent(signal.SIGTERM)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()  # where the kernel does not
    import uvicorn

    config = uvicorn.Config(
        "prefect.server.api.server:create_app",
        factory=True,
        fd=int(sys.argv[1]),
        log_level="error",
        lifespan="on",
    )
    uvicorn.Server(config).run()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
