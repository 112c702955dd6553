"""Owner of a lease: a process, distinguished from every other one on any machine."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass, fields

from danling_core.errors import StorageError
from danling_core.process_tree import start_time


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

    @classmethod
    def parse(cls, data: bytes) -> Owner:
        try:
            mapping = json.loads(data)
            return cls(**{field.name: mapping[field.name] for field in fields(cls) if field.name in mapping})
        except (ValueError, TypeError) as error:
            raise StorageError(f"not a lease: {data[:80]!r}: {error}") from error

    def dumps(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    def __str__(self) -> str:
        since, beat = (
            time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(t)) for t in (self.since, self.beat_at)
        )
        return f"{self.description}, pid {self.pid} on {self.host}, since {since}, last beat {beat}"


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
