"""Owner of a lease: a process, distinguished from every other one on any machine."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass, fields

from pydantic import TypeAdapter, ValidationError

from danling_core.errors import StorageError
from danling_core.process_tree import start_time
from danling_core.secrets import redact
from danling_core.storage import parse_json_object

_UNKNOWN = "unknown "


@dataclass(frozen=True)
class Owner:
    """Contents of a generation file.

    Args:
        token: tells this owner from every other one.
        description: who it is, for people.
        host: name of its machine.
        machine: boot and process namespace, equal only where a pid means the same process.
        pid: its process.
        pid_started: when that process started, in the kernel's ticks: a pid may be used again.
        since: when it acquired, seconds since the epoch by its own clock.
        beat: counts its beats.
        beat_at: when it last beat, by its own clock.
        is_released: it gave the run up in good order.
        flow_runs: ids under which an orchestrator shows what it does, the innermost first.
    """

    token: str
    description: str
    host: str
    machine: str
    pid: int
    pid_started: int
    since: float
    beat: int = 0
    beat_at: float = 0.0
    is_released: bool = False
    flow_runs: tuple[str, ...] = ()

    @classmethod
    def parse(cls, data: bytes, url: str) -> Owner:
        """Return the owner in bytes that were read at `url`; an unknown one where they are damaged.

        The unknown one is of no machine, so that it is watched like any that is far away: as long as the bytes change
        it lives.
        """
        try:
            mapping = parse_json_object(data, url)
            known = {field.name: mapping[field.name] for field in fields(cls) if field.name in mapping}
            return _OWNER.validate_python(known)
        except (StorageError, ValidationError):
            token = _UNKNOWN + hashlib.sha256(data).hexdigest()
            return cls(
                token, f"an unknown owner ({redact(url)} is damaged)", "an unknown machine", "", 0, 0, 0.0
            )

    @property
    def is_unknown(self) -> bool:
        """Return whether its file is damaged."""
        return self.token.startswith(_UNKNOWN)

    def dumps(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    def __str__(self) -> str:
        if self.is_unknown:
            return self.description
        since, beat = _moment(self.since), _moment(self.beat_at)
        return f"{self.description}, pid {self.pid} on {self.host}, since {since}, last beat {beat}"


_OWNER = TypeAdapter(Owner)


def _moment(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):  # no time that any clock has said
        return "an unknown time"


def this_process(description: str, now: float) -> Owner:
    """Return this process as an owner that begins at `now`, seconds since the epoch."""
    pid = os.getpid()
    return Owner(
        token=uuid.uuid4().hex,
        description=description,
        host=socket.gethostname(),
        machine=_machine(),
        pid=pid,
        pid_started=start_time(pid) or 0,
        since=now,
        beat_at=now,
    )


def is_dead(owner: Owner) -> bool:
    """Return whether the owner was a process of this machine that is no more. False for other machines."""
    return owner.machine == _machine() and start_time(owner.pid) != owner.pid_started


def beats_on_this_machine(owner: Owner, now: float, stale_after_seconds: float) -> bool:
    """Return whether the owner shares this machine's clock and has beaten lately by it."""
    return owner.machine == _machine() and 0 <= now - owner.beat_at < stale_after_seconds


def _machine() -> str:
    """Host, boot and pid namespace: equal for two processes only where a pid means the same to both."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}/{uuid.getnode():012x}"
