"""Context from a worker to the runner that it is about to build: folder, attempt, control block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from danling_core.parallel.control import Control
    from danling_core.session.rank_failures import RankFailures


@dataclass(frozen=True)
class RunContext:
    """Folder and attempt of a runner's work.

    Args:
        work_dir: local folder of the run; ranks write nowhere else.
        url: where the run is kept; equal to `work_dir` on a local disk.
        generation: of the lease that covers this run.
        restart: how many times the group was started again under this lease.
        control: block shared by this node's ranks, or None.
        nodes: how many nodes the ranks are on.
        failures: where ranks under torchrun tell each other what they failed of, or None.
        is_launched: a launcher of ours started the ranks. It sends what they print to the run's log, and tells
            which of them failed first; under torchrun the runner does both.
        sources: a hash of each file that the runner must still be made of, by path.
    """

    work_dir: str
    url: str
    generation: int = 1
    restart: int = 0
    control: Control | None = None
    nodes: int = 1
    failures: RankFailures | None = None
    is_launched: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def attempt(self) -> str:
        return f"{self.generation}.{self.restart}"


_current: ContextVar[RunContext | None] = ContextVar("danling_run_context", default=None)


def current() -> RunContext | None:
    """Return the context of the worker that builds a runner now, or None where a user builds one by hand."""
    return _current.get()


@contextlib.contextmanager
def use(context: RunContext) -> Iterator[None]:
    """Make `context` the one that runners built inside the block take."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)
