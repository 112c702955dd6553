"""The deployment that trains the runs of a group with `executor: deployment`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter
from prefect.exceptions import ObjectNotFound

from danling_core.errors import ConfigError

logger = logging.getLogger("danling.flows")


@dataclass(frozen=True)
class Target:
    """The deployment whose flow runs train: of the flow `run`."""

    id: UUID
    name: str
    work_pool: str | None

    @classmethod
    def find(cls, name: str) -> Target:
        """Return the deployment `run/NAME`, or the only one of the flow `run` where `name` is empty.

        Raises:
            ConfigError: there is none, or which is meant is not known, or its work pool is missing.
        """
        with get_client(sync_client=True) as client:
            if name:
                try:
                    found = [client.read_deployment_by_name(name)]
                except ObjectNotFound:
                    known = ", ".join(f"run/{each.name}" for each in _deployments_of_run(client)) or "none"
                    raise ConfigError(
                        f"deployment: there is no {name!r}; of the flow run there is: {known}"
                    ) from None
            else:
                found = _deployments_of_run(client)
            if len(found) != 1:
                names = ", ".join(f"run/{each.name}" for each in found)
                raise ConfigError(
                    f"deployment: which one? Set it to one of: {names}"
                    if found
                    else "executor: deployment needs a deployment of the flow run: `danling deploy RUN.yaml` makes one"
                )
            [deployment] = found
        target = cls(deployment.id, name or f"run/{deployment.name}", deployment.work_pool_name)
        try:
            if target._is_paused():
                logger.warning("%s", target._how_to_resume())
        except ObjectNotFound:
            raise ConfigError(
                f"deployment {target.name} is for the work pool {target.work_pool!r}, which is not there: "
                f"prefect work-pool create {target.work_pool} --type process"
            ) from None
        return target

    def why_untaken(self) -> str:
        """Return why flow runs of the deployment may wait to be begun, and what to do."""
        try:
            if self._is_paused():
                return self._how_to_resume()
        except ObjectNotFound:
            return (
                f"the work pool {self.work_pool!r} was deleted, and nobody will take them any more: stop this command, "
                f"make the pool (prefect work-pool create {self.work_pool} --type process), deploy again, start again"
            )
        return f"no worker takes them: prefect worker start --pool {self.work_pool or 'POOL'}"

    def _is_paused(self) -> bool:
        if self.work_pool is None:
            return False  # `flow.serve` runs it
        with get_client(sync_client=True) as client:
            return bool(client.read_work_pool(self.work_pool).is_paused)

    def _how_to_resume(self) -> str:
        return (
            f"the work pool {self.work_pool!r} is paused: its runs wait for `prefect work-pool resume "
            f"{self.work_pool}`"
        )


def _deployments_of_run(client: Any) -> list[Any]:
    return list(
        client.read_deployments(flow_filter=FlowFilter.model_validate({"name": {"any_": ["run"]}}), limit=200)
    )
