"""Run one group of ranks to its end with torch elastic: one launch, no restarts of its own."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.distributed import HashStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from danling_core.launch import child
from danling_core.launch.verdict import GroupEnd, RankEnd
from danling_core.launch.watch import Watch
from danling_core.parallel import loopback
from danling_core.parallel.shared_memory import why_unusable

_MONITOR_SECONDS = 0.03


def quieten() -> None:
    """Silence elastic's own log, for the verdict says it better. Each of its modules has a logger."""
    for name in [
        *logging.root.manager.loggerDict,
        "torch.distributed.elastic",
        "torch.multiprocessing.spawn",
    ]:
        if name.startswith(("torch.distributed", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # Nothing that means save and stop: such a signal is the launcher's own.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"


class _Agent(LocalElasticAgent):
    """Elastic's agent, which hands over its processes, and notices ranks that vanish with exit code 0."""

    def __init__(self, spec: WorkerSpec, logs: DefaultLogsSpecs, watch: Watch) -> None:
        super().__init__(spec, logs, start_method="forkserver", exit_barrier_timeout=30, shutdown_timeout=5)
        self.watch = watch
        self.processes: dict[int, BaseProcess] = {}

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        pids: dict[int, Any] = super()._start_workers(worker_group)
        # not active_children(): that forgets a rank that has ended by now, and how it ended
        context: Any = self._pcontext
        self.processes = dict(enumerate(context._pc.processes))
        self.watch.adopt(pids, time.monotonic())
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state is WorkerState.HEALTHY and self.watch.is_group_gone:
            return RunResult(state=WorkerState.FAILED)
        return result


class _OneNode(RendezvousHandler):
    """Rendezvous of an agent that has nobody to meet: no port, where elastic's own listen on every address."""

    def __init__(self) -> None:
        self._store = HashStore()
        self._is_closed = False

    def get_backend(self) -> str:
        return "none"

    def get_run_id(self) -> str:
        return "danling"

    def next_rendezvous(self) -> RendezvousInfo:
        # The port is free, and not used: it is for user code that makes a process group of its own.
        with loopback.listen() as listener:
            info = RendezvousStoreInfo(*loopback.address(listener))
        return RendezvousInfo(self._store, rank=0, world_size=1, bootstrap_store_info=info)

    def is_closed(self) -> bool:
        return self._is_closed

    def set_closed(self) -> None:
        self._is_closed = True

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        self._is_closed = True
        return True


def run_group(order: dict[str, Any], world_size: int, folder: str, watch: Watch) -> GroupEnd:
    """Start the ranks, wait for their end, and say how each ended. Called in the launcher's main thread.

    Args:
        order: given to each rank; see `child.enter_rank`.
        folder: private, for this launch.
        watch: of this group; its thread runs already.
    """
    order = {
        **order,
        "failure_path": os.path.join(folder, "failure-{rank}.json"),
        "meeting_path": os.path.join(folder, "meeting"),
    }
    agent = _make_agent(child.enter_rank, order, world_size, folder, watch)
    launch_error: str | None = None
    try:
        agent.run()
    except Exception as error:
        reason = why_unusable(error) or f"{type(error).__name__}: {error}"
        launch_error = f"the ranks could not be launched: {reason}"
    finally:
        watch.sweep()  # not kill: ranks that are about to die by themselves must not count as killed by us
        agent.get_worker_group().spec.rdzv_handler.shutdown()
    ranks = [_rank_end(agent, watch, rank, order["failure_path"]) for rank in range(world_size)]
    return GroupEnd(ranks, watch.hang, launch_error)


def _make_agent(
    entrypoint: Callable[..., None], order: dict[str, Any], world_size: int, folder: str, watch: Watch
) -> _Agent:
    spec = WorkerSpec(
        role="rank",
        local_world_size=world_size,
        entrypoint=entrypoint,
        args=(order,),
        rdzv_handler=_OneNode(),
        max_restarts=0,
        monitor_interval=_MONITOR_SECONDS,
        local_addr="localhost",
    )
    return _Agent(spec, DefaultLogsSpecs(log_dir=folder), watch)


def _rank_end(agent: _Agent, watch: Watch, rank: int, failure_path: str) -> RankEnd:
    process, cells = agent.processes.get(rank), watch.control.ranks[rank]
    path = Path(failure_path.format(rank=rank))
    return RankEnd(
        exit_code=None if process is None else process.exitcode,
        is_done=cells.is_done,
        step=cells.step,
        failure=json.loads(path.read_text(encoding="utf-8")) if path.exists() else None,
        was_killed=rank in watch.killed,
    )
