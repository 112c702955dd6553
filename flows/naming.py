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


def project_tag(root: str) -> str:
    """Return the tag of every flow run under a project root."""
    return f"project:{Path(root).expanduser().resolve() if is_local(root) else root}"


def tags_of(config: Config) -> list[str]:
    """Return `project:`, `group:` (in a group) and `experiment:` tags. A project is its storage root, in full."""
    tags = [project_tag(config.project_root), f"experiment:{config.experiment_name}"]
    return tags if config.group is None else [*tags, f"group:{config.group}"]


def counted(config: Config) -> tuple[str, int | None]:
    """Return the unit of a run's results, "epoch" or "step", and their number where that is stated."""
    return ("step", config.step_end) if config.epoch_end is None else ("epoch", config.epoch_end)


def span_end(opening: Mapping[str, Any], config: Config) -> int | None:
    """Return the last epoch that one task run stands for, beginning with the one that opens; None for that one alone.

    From epoch 100 on it is ten epochs, from 1000 on a hundred, and so on: a timeline of thousands would be dust.
    """
    index = opening["index"]
    if index is None or index < 100:
        return None
    size = 10 ** (len(str(index)) - 2)
    last = index - index % size + size - 1
    return int(last if config.epoch_end is None else min(last, config.epoch_end - 1))


def stage_name(opening: Mapping[str, Any], config: Config) -> str:
    """Return the name of a stage's task, by the index of its result: `epoch-3`, `epochs-100-109`, `step-100`."""
    if opening["index"] is not None:
        last = span_end(opening, config)
        return f"epoch-{opening['index']}" if last is None else f"epochs-{opening['index']}-{last}"
    every, end, step = config.evaluate_interval_steps, config.step_end, opening["step"]
    if every is None or end is None:  # where it ends, the data decides
        return f"from-step-{step}"
    return f"step-{min(end, step - step % every + every)}"
