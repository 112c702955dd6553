"""Plan of a run: made once when it is prepared, and carried on to every part of the driver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from danling_core.config import Config
from danling_core.identity.ids import Identity, identify
from danling_core.launch.messages import Prepared, RunRequest
from danling_core.session.open_run import OpenedRun


@dataclass(frozen=True)
class RunPlan:
    """A validated run: its full config, with the experiment id stated, and facts that only its code can tell.

    Args:
        source_file: where the runner is defined.
        sources: a hash of each file that the runner is made of, by path.
        world_size: the number of ranks, `auto` resolved.
        device: "cpu", or the kind of accelerator.
        gpus: how many torch finds of that.
    """

    config: Config
    source_file: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    world_size: int = 1
    device: str = "cpu"
    gpus: int = 0

    @classmethod
    def of(cls, prepared: Prepared) -> RunPlan:
        """Make the plan from the launcher's answer; the same code is meant wherever it is carried."""
        config = Config.from_dict({**prepared.config, "experiment_id": prepared.experiment_id})
        facts = prepared.source_file, prepared.sources, prepared.world_size, prepared.device, prepared.gpus
        return cls(config, *facts)

    @cached_property
    def identity(self) -> Identity:
        return identify(self.config, self.source_file)

    @property
    def key(self) -> str:
        """Return name and id: one per run of a project."""
        return f"{self.identity.name}-{self.identity.id}"

    @property
    def names(self) -> dict[str, Any]:
        """Return the names of this run, whose folder may have been made under others."""
        config, identity = self.config, self.identity
        return {
            "name": identity.name,
            "id": identity.id,
            "experiment_name": config.experiment_name,
            "run_name": config.run_name,
            "group": config.group,
        }

    def request(self, opened: OpenedRun, **changes: Any) -> RunRequest:
        """Make the request to launch this run in its opened folder."""
        return request_of(
            self.config,
            opened.work_dir,
            remote_url=opened.remote_url,
            generation=opened.generation,
            nproc=self.world_size,
            sources=dict(self.sources),
            **changes,
        )


def request_of(config: Config, work_dir: str, **fields: Any) -> RunRequest:
    """Make the request to launch a run of this config in a local folder; see `RunRequest` for the fields."""
    stated = {
        "stages": config.stages,
        "threads_per_rank": config.threads_per_rank,
        "hang_timeout_seconds": config.hang_timeout_seconds,
        "max_restarts": config.max_restarts,
        "stop_grace_seconds": config.stop_grace_seconds,
    }
    return RunRequest(config=config.dict(), work_dir=work_dir, **{**stated, **fields})
