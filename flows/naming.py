"""Names and tags by which the orchestrator's UI groups runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def counted(config: Config) -> tuple[str, int | None]:
    """What a run's results are counted in, "epoch" or "step", and how many there will be where that is stated."""
    return ("step", config.step_end) if config.epoch_end is None else ("epoch", config.epoch_end)


def stage_name(opening: Mapping[str, Any], config: Config) -> str:
    """What the task of a stage is called, by the index that its result will have: `epoch-3`, `step-100`."""
    if opening["index"] is not None:
        return f"epoch-{opening['index']}"
    every, end, step = config.evaluate_interval_steps, config.step_end, opening["step"]
    if every is None or end is None:  # where it ends, the data decides
        return f"from-step-{step}"
    return f"step-{min(end, step - step % every + every)}"
