"""What another user of the machine can do to a run that trains: nothing that docs/security.md does not state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.prefect_fixtures import PrefectServer
from tests.processes import listening, tree, wait_until
from tests.whole.test_cli import Make, _danling, _has_told

NOBODY = 65534
PROBE = """
import encodings.idna, http.client, json, os, socket, ssl, sys, urllib.error, urllib.request
os.setgroups([]); os.setgid(65534); os.setuid(65534)
asked, found = json.load(sys.stdin), []
for path in asked["paths"]:
    for right, name in ((os.R_OK, "read"), (os.W_OK, "write"), (os.X_OK, "execute")):
        if os.access(path, right):
            found.append(f"{name} {path}")
for path in asked["sockets"]:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect("\\0" + path[1:] if path[0] == "@" else path)
            found.append(f"connect {path}")
        except OSError:
            pass
answers = {}
for port in asked["ports"]:
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/api/flow_runs/filter", data=b"{}")
        answers[port] = urllib.request.urlopen(request, timeout=2).status
    except urllib.error.HTTPError as error:
        answers[port] = error.code
    except OSError:
        answers[port] = None
json.dump({"found": found, "answers": answers}, sys.stdout)
"""


@pytest.mark.long
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_gets_at_nothing_of_a_run_that_trains(
    toy_config: Make, tmp_path: Path, prefect_home: Path
) -> None:
    environment = {**os.environ, "PREFECT_HOME": str(prefect_home)}
    config = toy_config(nproc_per_node=2, epoch_end=4000, params={"sleep_seconds": 0.02})
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(config))
    process = _danling(PrefectServer("", environment), "run", str(file))
    try:
        wait_until(lambda: _has_told((tmp_path / "experiments").glob, "epoch_finished"), "the first epoch")
        pids = [pid for _, pid in tree(process.pid)]
        assert len(pids) >= 5
        ports = set().union(*(listening(pid) for pid in pids))
        assert ports and all(each.startswith(("0100007F:", f"{1 << 24:032X}:")) for each in ports), ports
        opened = {path for pid in pids for path in _opened(pid)}
        folders = {str(folder) for path in opened for folder in Path(path).parents if len(folder.parts) > 2}
        asked = {
            "paths": sorted(_own(opened | folders)),
            "sockets": sorted(_sockets(pids)),
            "ports": sorted(int(each.partition(":")[2], 16) for each in ports),
        }
        assert asked["paths"] and asked["sockets"]
        done = subprocess.run(
            [sys.executable, "-c", PROBE],
            input=json.dumps(asked),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        said = json.loads(done.stdout)
        assert said["found"] == []
        assert set(said["answers"].values()) <= {401, None} and 401 in said["answers"].values(), said
        assert process.poll() is None
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 75


def _opened(pid: int) -> set[str]:
    """The files that a process has open, of those that have a name."""
    found = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            path = os.readlink(descriptor)
        except FileNotFoundError:
            continue
        if path.startswith("/") and os.path.exists(path) and not path.startswith(("/dev/", "/proc/")):
            found.add(path)
    return found


def _own(paths: set[str]) -> set[str]:
    """Leave out what is not the run's: Python and its packages, and the machine's temporary folder itself."""
    installed = (sys.prefix, sys.base_prefix, "/usr", "/lib", "/etc")
    return {path for path in paths if not path.startswith(installed) and path != "/tmp"}


def _sockets(pids: list[int]) -> set[str]:
    """The named sockets of the processes; those in the abstract name space begin with `@`."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(descriptor))
            except FileNotFoundError:
                continue
    found = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        if len(words) == 8 and f"socket:[{words[6]}]" in inodes:
            found.add(words[7])
    return found
