"""Names and tags by which the orchestrator's UI groups runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from danling_core.config import Config
from danling_core.storage import is_local


def run_display_name(config: Config) -> str:
    """Return a run's name before its id is known: `{experiment_name}-{run_name}`, or its own name."""
    return config.name if config.name is not None else f"{config.experiment_name}-{config.run_name}"


def tags_of(config: Config) -> list[str]:
    """Return `project:`, `group:` (in a group) and `experiment:` tags. A project is its storage root, in full."""
    root = config.project_root
    project = str(Path(root).expanduser().resolve()) if is_local(root) else root
    tags = [f"project:{project}", f"experiment:{config.experiment_name}"]
    return tags if config.group is None else [*tags, f"group:{config.group}"]


def counted(config: Config) -> tuple[str, int | None]:
    """Return the unit of a run's results, "epoch" or "step", and their number where that is stated."""
    return ("step", config.step_end) if config.epoch_end is None else ("epoch", config.epoch_end)


def stage_name(opening: Mapping[str, Any], config: Config) -> str:
    """Return the name of a stage's task, by the index of its result: `epoch-3`, `step-100`."""
    if opening["index"] is not None:
        return f"epoch-{opening['index']}"
    every, end, step = config.evaluate_interval_steps, config.step_end, opening["step"]
    if every is None or end is None:  # where it ends, the data decides
        return f"from-step-{step}"
    return f"step-{min(end, step - step % every + every)}"
