"""Names and tags by which the orchestrator's UI groups runs."""

from __future__ import annotations

from pathlib import Path

from danling_core.config import Config
from danling_core.storage import is_local


def run_display_name(config: Config) -> str:
    """What a run is called where its id is not known yet: `{experiment_name}-{run_name}`, or its own name."""
    return config.name if config.name is not None else f"{config.experiment_name}-{config.run_name}"


def tags_of(config: Config) -> list[str]:
    """`project:`, `group:` (in a group) and `experiment:` tags. A project is its storage root, in full."""
    root = config.project_root
    project = str(Path(root).expanduser().resolve()) if is_local(root) else root
    tags = [f"project:{project}", f"experiment:{config.experiment_name}"]
    return tags if config.group is None else [*tags, f"group:{config.group}"]
