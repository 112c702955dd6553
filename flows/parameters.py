"""Parameters of the flows: types with a schema by which Prefect's API refuses a wrong one before a run exists."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from danling_core.config import Config
from danling_core.errors import ConfigError
from danling_core.launch.plan import RunPlan

_KEYS = "|".join(Config.model_fields)

Overrides = Annotated[
    dict[str, Any],
    Field(
        json_schema_extra={
            "propertyNames": {"pattern": rf"^({_KEYS})(\..+)?$"},
            "examples": [{"params.lr": 0.01, "epoch_end": 5}],
        }
    ),
]
"""Dotted changes of a config: the first part of each key is a key of the config."""


def refuse_other_ids(plans: Sequence[RunPlan], expected_id: str) -> None:
    """Raise ConfigError for a run whose id does not begin as it was expected to, as where a worker has other code."""
    for plan in plans:
        if not plan.identity.id.startswith(expected_id):
            is_commit = plan.identity.id[:8] != expected_id[:8]
            why = (
                "the code is another one"
                if is_commit
                else "the code differs in what is not committed, or something in the config depends on the machine"
            )
            raise ConfigError(
                f"{plan.identity.name} has the id {plan.identity.id} here, and {expected_id} is expected: {why}. "
                f"The code is {plan.identity.experiment_id} in {os.getcwd()} on {socket.gethostname()}: bring it to "
                "the commit that is meant, or deploy again from there"
            )
