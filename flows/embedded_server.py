"""An embedded Prefect server's process: `python -m flows.embedded_server SOCKET_FD`; ends with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve the API on the listening socket that was inherited as file descriptor `SOCKET_FD`."""
    parent = os.getppid()
    _die_with(parent)
    import uvicorn

    config = uvicorn.Config(
        "prefect.server.api.server:create_app",
        factory=True,
        fd=int(sys.argv[1]),
        log_level="error",
        lifespan="on",
    )
    uvicorn.Server(config).run()


def _die_with(parent: int) -> None:
    """Have the kernel send SIGTERM when the parent's spawning thread ends; look ourselves as well."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
