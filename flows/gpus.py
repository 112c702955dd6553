"""Share out this machine's GPUs: the runs that train at the same time each have their own."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from danling_core.errors import ConfigError
from danling_core.launch.plan import RunPlan

logger = logging.getLogger("danling.flows")

VARIABLE = "CUDA_VISIBLE_DEVICES"


def runs_at_once(slots: int, plans: Sequence[RunPlan]) -> int:
    """Return how many runs may train at a time: `slots`, or as many as the GPUs suffice for, with a warning.

    Raises:
        ConfigError: a config states `device: cuda`, and there are fewer GPUs than all slots together want.
    """
    on_gpus = [one for one in plans if _is_on_gpus(one)]
    if slots == 1 or not on_gpus:
        return slots
    ranks = max(one.world_size for one in on_gpus)
    gpus = on_gpus[0].gpus
    if slots * ranks <= gpus:
        return slots
    fitting = max(gpus // ranks, 1)
    found = f"{slots} runs at a time of {ranks} ranks each want {slots * ranks} GPUs, and there are {gpus}"
    if any(one.config.device == "cuda" for one in on_gpus):
        raise ConfigError(f"{found}: use concurrency: {fitting}, fewer nproc_per_node, or device: cpu")
    logger.warning("%s: only %d at a time", found, fitting)
    return fitting


def shares(visible: str | None, gpus: int, slots: int) -> list[str]:
    """Return each slot's CUDA_VISIBLE_DEVICES: parts of equal size, without any GPU in common.

    Args:
        visible: this process's own CUDA_VISIBLE_DEVICES (indices or UUIDs); None or empty: all of them.
        gpus: how many torch finds.
        slots: how many parts; no more than there are GPUs.
    """
    names = visible.split(",") if visible else [str(index) for index in range(gpus)]
    size = gpus // slots
    return [",".join(names[slot * size : (slot + 1) * size]) for slot in range(slots)]


def share_count(plans: Sequence[RunPlan]) -> int:
    """Return the GPUs that there are to share; 0 where no run uses one."""
    return max((one.gpus for one in plans if _is_on_gpus(one)), default=0)


def _is_on_gpus(plan: RunPlan) -> bool:
    """Return whether a run trains on GPUs. With `device: auto`, a run of more ranks than GPUs trains on the CPU."""
    is_stated = plan.config.device == "cuda"
    return plan.device == "cuda" and (is_stated or plan.world_size <= plan.gpus)
