"""moto's S3 server on loopback, a process of its own: `python -m tests.s3_server` says its URL, and serves.

In the tests' own process it would draw from Python's global generator, which belongs to the bits of their runs.
"""

from __future__ import annotations

import threading
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.responses import S3Response
from werkzeug.serving import make_server


def main() -> None:
    """Serve until killed."""
    _put_in_one_go()
    server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


def _put_in_one_go() -> None:
    """Look for an object and put it in one go, as S3 does: moto lets another put come between."""
    alone = threading.Lock()
    put_object = S3Response.put_object

    def put_alone(self: S3Response) -> Any:
        with alone:
            return put_object(self)

    S3Response.put_object = put_alone  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
