"""The seed task: record what every rank is seeded with, before anything trains."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed


@task(name="seed", task_run_name="seed-{seed}", cache_policy=NO_CACHE, persist_result=False)
def record_seed(seed: int, world_size: int, deterministic: bool = False) -> State[dict[str, Any]]:
    """Return seeds of a run: `seed` shuffles the data and is the same on all ranks; rank r draws from `seed + r`."""
    seeds = {
        "seed": seed,
        "rank_seeds": [seed + rank for rank in range(world_size)],
        "deterministic": deterministic,
    }
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    how = ", deterministic algorithms" if deterministic else ""
    return Completed(message=f"seed {seed}, {ranks}{how}", data=seeds)
