"""The state of a stage in which its run ended."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Failed

from tasks.observation import Observation


def ended_inside(observation: Observation, stage: str) -> State[Any]:
    """Return Cancelled where the run was stopped on purpose inside the stage, else Failed with the run's error."""
    if observation.cut_off is not None:
        return Cancelled(message=f"{type(observation.cut_off).__name__} in the driver of the run")
    terminal = observation.terminal or {}
    if terminal.get("event") == "interrupted":
        return Cancelled(name="Interrupted", message=str(terminal.get("reason", "interrupted")))
    return Failed(message=str(terminal.get("error", f"the run ended inside {stage}")))
