"""A PostgreSQL server of Debian's packages, on loopback, for a test."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from danling_core.parallel import loopback


def binaries() -> Path | None:
    """Return the folder of the newest PostgreSQL's programs; None where none is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    program = shutil.which("initdb")
    return None if program is None else Path(program).parent


@contextlib.contextmanager
def postgres(bin: Path) -> Iterator[str]:
    """Yield the URL, for SQLAlchemy with asyncpg, of an empty database."""
    folder = Path(tempfile.mkdtemp(prefix="danling-postgres-"))
    # It refuses to run as root.
    as_user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    if as_user:
        os.chown(folder, 65534, 65534)
    with loopback.listen(0) as listener:
        port = loopback.address(listener)[1]
    data = folder / "data"
    initdb = [*as_user, bin / "initdb", "-D", data, "-U", "danling", "--auth=trust", "--no-sync"]
    subprocess.run(initdb, check=True, capture_output=True, cwd=folder)
    options = ["-p", str(port), "-c", "listen_addresses=127.0.0.1", "-k", str(folder)]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [*as_user, bin / "postgres", "-D", data, *options], stdout=log, stderr=log, cwd=folder
        )
    try:
        ready = [bin / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
        for _ in range(200):
            if subprocess.run(ready, capture_output=True).returncode == 0:
                break
            if server.poll() is not None:
                raise RuntimeError((folder / "log").read_text())
            subprocess.run(["sleep", "0.1"], check=True)
        create = [bin / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "danling", "prefect"]
        subprocess.run(create, check=True, capture_output=True)
        yield f"postgresql+asyncpg://danling@127.0.0.1:{port}/prefect"
    finally:
        server.terminate()
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
