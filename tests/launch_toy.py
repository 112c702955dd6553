"""Ranks that misbehave in one way each: they stand in for the worker in the tests of the launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from danling_core.errors import ConfigError
from danling_core.launch.child import load
from danling_core.parallel.control import Control, RankControl
from danling_core.writers.events import EventLog

HERE = "tests.launch_toy"


def run_rank(request: dict[str, Any], control_path: str, restart: int) -> None:
    """Leave a note of this process, then do what the config names."""
    rank = int(os.environ["LOCAL_RANK"])
    control = Control.open(control_path)
    signal.signal(signal.SIGTERM, lambda *_: control.request_stop())
    note = {
        "pid": os.getpid(),
        "server": os.getppid(),
        "cwd": os.getcwd(),
        "path": sys.path[0],
        "env": dict(os.environ),
        "fds": {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)},
    }
    path = Path(request["work_dir"], f"rank-{rank}-{restart}.json")
    path.with_suffix(".part").write_text(json.dumps(note))
    path.with_suffix(".part").rename(path)
    config = request["config"]
    ROLES[config["role"]](Rank(request, control, control.ranks[rank], rank, restart))


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


class Rank:
    """What every role needs."""

    def __init__(
        self, request: dict[str, Any], control: Control, cells: RankControl, rank: int, restart: int
    ) -> None:
        self.control, self.cells, self.rank, self.restart = control, cells, rank, restart
        self.config, self.work_dir = request["config"], request["work_dir"]
        self.attempt = f"{request['generation']}.{restart}"

    def emit(self, kind: str, **fields: Any) -> None:
        if self.rank == 0:
            log = EventLog(os.path.join(self.work_dir, "events.jsonl"), self.attempt)
            log.emit(kind, **fields)
            log.close()

    def beat(self, step: int) -> None:
        self.cells.beat(step)  # twice: the first step is over
        self.cells.beat(step)

    def is_chosen(self) -> bool:
        """Whether this is the rank, in the launch, that shall misbehave."""
        is_rank: bool = self.rank == self.config.get("rank", 0)
        return is_rank and self.restart < int(self.config.get("times", 1))


def complete(rank: Rank) -> None:
    rank.beat(0)
    rank.emit("run_started")
    rank.emit("completed")


def stop_when_asked(rank: Rank) -> None:
    rank.emit("run_started")
    while not rank.control.stop_requested:
        rank.beat(1)
        time.sleep(0.01)
    rank.emit("interrupted", reason="asked", step=1)


def never_stop(rank: Rank) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rank.emit("run_started")
    while True:
        rank.beat(1)
        time.sleep(0.01)


def misbehave(rank: Rank) -> None:
    """The chosen rank does something bad at step 3; the others wait for it, as in a collective."""
    rank.emit("run_started")
    rank.beat(3 + (rank.restart if rank.config.get("moves", True) else 0))
    if rank.is_chosen():
        _bad(rank.config["bad"])
    if rank.restart < rank.config.get("times", 1):
        while True:
            time.sleep(0.01)
    rank.emit("completed")


def _bad(what: str) -> None:
    if what == "raise":
        raise ValueError("the loss is a fish")
    if what == "exit":
        sys.exit(0)
    if what == "vanish":
        os._exit(0)
    if what == "hang":
        hang_here()
    os.kill(os.getpid(), getattr(signal, what))
    hang_here()


def hang_here() -> None:
    while True:
        time.sleep(0.01)


def abort_after_completed(rank: Rank) -> None:
    rank.emit("completed")
    rank.cells.finish()
    if rank.rank == 1:
        events = Path(rank.work_dir, "events.jsonl")
        while not (events.exists() and "completed" in events.read_text()):
            time.sleep(0.01)
        os.abort()


def echo(rank: Rank) -> None:
    """Real ranks in a collective, of which one is killed: the others get the error of a lost peer."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.ones(4)
    for step in range(5):
        rank.beat(step)
        if step == 3 and rank.is_chosen():
            _bad(rank.config["bad"])
        dist.all_reduce(value)
    dist.barrier()
    rank.emit("completed")
    rank.cells.finish()
    dist.destroy_process_group()


def with_loader(rank: Rank) -> None:
    """A rank with real loader workers, whose pids it notes; it goes on until asked to stop."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(torch.arange(1 << 20)), batch_size=1, num_workers=2)
    batches = iter(loader)
    next(batches)
    child = subprocess.Popen(["sleep", "1000"])
    rank.emit("run_started")
    pids = [worker.pid for worker in batches._workers] + [child.pid]  # type: ignore[attr-defined]
    rank.emit("progress", workers=pids)
    stop_when_asked(rank)
    child.kill()


def meet(rank: Rank) -> None:
    """A rank in the process group that runs make; it goes on until asked to stop."""
    import torch

    from danling_core.parallel import distributed

    distributed.init_process_group(torch.device("cpu"), 60.0)
    distributed.all_gather_objects(rank.rank)
    rank.emit("run_started")
    stop_when_asked(rank)
    distributed.destroy_process_group()


ROLES = {
    role.__name__: role
    for role in (
        complete,
        stop_when_asked,
        never_stop,
        misbehave,
        abort_after_completed,
        echo,
        with_loader,
        meet,
    )
}


def prepare(config: dict[str, Any], cwd: str) -> dict[str, Any]:
    """Import the runner that the config names, as the worker's does, and say what was found."""
    if config.get("runner") is None:
        raise ConfigError("runner is missing")
    load(config["runner"])
    return {
        "config": {**config, "pid": os.getpid(), "cwd": os.getcwd(), "seen": os.environ.get("DANLING_TOY")},
        "experiment_id": "e" * 40,
        "world_size": 2,
    }
