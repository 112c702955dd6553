"""Types of the flows' parameters, with a schema by which Prefect's API refuses a wrong one before a run exists."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from danling_core.config import Config

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
