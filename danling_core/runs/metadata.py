"""Contents of `metadata.json`: code, packages, machine, command. Never the environment."""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from danling_core import storage
from danling_core.errors import ConfigError, StorageError
from danling_core.identity.code_state import git_output
from danling_core.secrets import redact, redact_command

DIFF_LIMIT_BYTES = 256 * 1024
ATTEMPTS_KEPT = 50
_COMMAND_TIMEOUT_SECONDS = 10.0
_UNTRACKED_KEPT = 200


def collect(folder: str | None = None, *, group: str | None = None) -> dict[str, Any]:
    """Everything worth knowing about how a run came to be, as plain JSON values. Takes some 100 ms.

    Args:
        folder: a folder of the code's git repository; the current one by default.
        group: the run's group.
    """
    return {
        "created_at": datetime.now(UTC).isoformat(),
        "group": group,
        "user": user_name(),
        "host": socket.gethostname(),
        "command": redact_command(command_line()),
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "git": git_state(folder or os.getcwd()),
        "packages": package_versions(),
        "hardware": hardware(),
    }


def attempt_entry(**facts: Any) -> dict[str, Any]:
    """One entry of the list `attempts`: when, where and by which command a run was begun or resumed.

    Args:
        facts: more of them (generation, nproc_per_node, ...), as plain JSON values.
    """
    here = {"time": datetime.now(UTC).isoformat(), "host": socket.gethostname(), "pid": os.getpid()}
    return {**here, "command": redact_command(command_line()), **facts}


def read(url: str) -> dict[str, Any]:
    """Return the metadata at a URL. Raises `NotFound`, or `StorageError` where it holds something else."""
    known = storage.read_json_object(url)
    attempts, total = known.get("attempts", []), known.get("attempts_total", 0)
    if not isinstance(attempts, list) or not isinstance(total, int):
        raise StorageError(f"{redact(url)!r} holds no list of attempts")
    return known


def with_attempt(metadata: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return `metadata` with one more attempt: the first and the newest are kept; `attempts_total` counts all."""
    attempts = [*metadata.get("attempts", []), dict(entry)]
    total = int(metadata.get("attempts_total", len(attempts) - 1)) + 1
    if len(attempts) > ATTEMPTS_KEPT:
        attempts = [attempts[0], *attempts[-(ATTEMPTS_KEPT - 1) :]]
    return {**metadata, "attempts": attempts, "attempts_total": total}


def git_state(folder: str) -> dict[str, Any] | None:
    """Commit, branch, is_dirty, the diff (cut at 256 KiB, secrets masked); None outside git."""
    commit = _git_line(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    diff = redact(_git(folder, "diff", "HEAD", "--no-color", "--no-ext-diff") or "")
    untracked = (_git(folder, "ls-files", "--others", "--exclude-standard") or "").splitlines()
    return {
        "commit": commit,
        "branch": _git_line(folder, "rev-parse", "--abbrev-ref", "HEAD") or "",
        "remote": redact(_git_line(folder, "config", "--get", "remote.origin.url") or "") or None,
        "is_dirty": bool(diff or untracked),
        "diff": _cut(diff, DIFF_LIMIT_BYTES),
        "diff_is_cut": len(diff.encode()) > DIFF_LIMIT_BYTES,
        "untracked": untracked[:_UNTRACKED_KEPT],
    }


def _git(folder: str, *arguments: str) -> str | None:
    try:
        answer = git_output(Path(folder), *arguments)
    except ConfigError:  # no answer in time: metadata is best effort
        return None
    return None if answer is None else answer.decode("utf-8", errors="replace")


def _git_line(folder: str, *arguments: str) -> str | None:
    answer = _git(folder, *arguments)
    return None if answer is None else answer.removesuffix("\n")


def package_versions() -> dict[str, str]:
    """Every installed distribution and its version, sorted by name."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(name, distribution.version)  # the first on the path is the one that is imported
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def hardware() -> dict[str, Any]:
    """CPU model, cores that this process may use, memory in bytes, and NVIDIA GPUs."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "gpus": _gpus(),
    }


def command_line() -> list[str]:
    """Return the command of this process, not yet redacted."""
    return list(getattr(sys, "orig_argv", sys.argv))


def user_name() -> str:
    """Return the login name, or the uid where there is none (as in many containers)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _output(command: Sequence[str]) -> str | None:
    """Return a command's output; None where it is missing, fails or takes too long: metadata is best effort."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_COMMAND_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", errors="replace") if done.returncode == 0 else None


def _cut(text: str, limit_bytes: int) -> str:
    return text.encode()[:limit_bytes].decode("utf-8", errors="ignore")


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith(("model name", "Model")):
                    return line.partition(":")[2].strip()
    except OSError:
        return platform.processor()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _gpus() -> list[dict[str, str]]:
    fields = ("name", "memory.total", "driver_version", "uuid")
    listing = _output(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"])
    rows = [[value.strip() for value in line.split(",")] for line in (listing or "").splitlines()]
    return [dict(zip(fields, row, strict=False)) for row in rows if len(row) == len(fields)]
