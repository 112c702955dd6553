"""Messages between driver and launcher: JSON lines, one request or reply each."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from danling_core.errors import RunFailed, RunInterrupted


@dataclass(frozen=True)
class RunRequest:
    """One run, as the launcher and the ranks get it.

    Args:
        config: the canonical full config.
        work_dir: the run's local folder, made by the driver.
        remote_url: the run's folder on an object store, where there is one; `work_dir` is then its local
        copy. generation: of the driver's lease; an attempt is called `{generation}.{restart}`.
        stages: what to do, in order, of "train" and "evaluate".
        nproc: the number of ranks, resolved.
        hang_timeout_seconds: silence of a rank that is taken for a hang; see `control.silence_allowed`.
        max_restarts: relaunches after a death or a hang.
        stop_grace_seconds: from the wish to stop until the ranks are killed.
        sources: as in `Prepared`, for rank 0 to compare with what it imports.
    """

    config: dict[str, Any]
    work_dir: str
    remote_url: str | None = None
    generation: int = 1
    stages: tuple[str, ...] = ("train", "evaluate")
    threads_per_rank: int = 1
    nproc: int = 1
    hang_timeout_seconds: float = 600.0
    max_restarts: int = 3
    stop_grace_seconds: float = 30.0
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def events_path(self) -> str:
        """Return the event log of the run, which rank 0 appends to."""
        return os.path.join(self.work_dir, "events.jsonl")

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        return {**asdict(self), "stages": list(self.stages)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> RunRequest:
        """Return the inverse of `to_dict`; unknown fields are a TypeError."""
        return cls(**{**fields, "stages": tuple(fields.get("stages", ("train", "evaluate")))})


@dataclass(frozen=True)
class Prepared:
    """Facts about a config that the launcher found by importing its runner.

    Args:
        config: the canonical full config, params validated.
        experiment_id: of the code.
        source_file: where the runner is defined.
        sources: a hash of each file that the runner is made of, by path; none where the user stated the
            experiment id, and so vouches for the code.
        world_size: the number of ranks, `auto` resolved.
        device: "cpu", or the kind of accelerator.
        gpus: how many torch finds of that.
    """

    config: dict[str, Any]
    experiment_id: str
    source_file: str | None = None
    sources: dict[str, str] = field(default_factory=dict)
    world_size: int = 1
    device: str = "cpu"
    gpus: int = 0

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Prepared:
        """Read what `launch.prepare.prepare` returned."""
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__ if name in fields})


@dataclass(frozen=True)
class Outcome:
    """End of a run, by its terminal event or, where there is none, by what the launcher saw.

    Args:
        error: the first failure in one line.
        traceback: of the rank that failed first.
        rank: the rank that failed first.
        step: the step it was working on.
        restarts: how often the ranks were relaunched.
        is_bad_input: what failed is what the user gave, and nothing was trained.
    """

    status: Literal["complete", "failed", "interrupted"]
    error: str | None = None
    traceback: str | None = None
    rank: int | None = None
    step: int | None = None
    restarts: int = 0
    is_bad_input: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        return asdict(self)

    def check(self) -> Outcome:
        """Return self if the run is complete; raise RunFailed or RunInterrupted otherwise."""
        if self.status == "failed":
            raise RunFailed(self.error or "the run failed", self.traceback, self.rank)
        if self.status == "interrupted":
            raise RunInterrupted(self.error or "the run was interrupted; run it again to resume")
        return self
