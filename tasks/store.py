"""The store task: say where everything of a run lies, and check that it is there."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from danling_core.runs.folder import RunFolder, find_checkpoints
from danling_core.storage import exists

RESULTS = ("config", "metadata", "events", "results", "latest", "best", "evaluation", "status")


@task(name="store", task_run_name="store", cache_policy=NO_CACHE, persist_result=False)
def store(
    folder_url: str, required: tuple[str, ...] = ("config", "metadata", "results", "status")
) -> State[Any]:
    """Return addresses of a run's files: `{"folder": url, "files": {name: url}}`. Failed: one is missing."""
    folder = RunFolder(folder_url)
    addresses = {name: getattr(folder, f"{name}_url") for name in RESULTS}
    missing = [addresses[name] for name in required if not exists(addresses[name])]
    if missing:
        return Failed(message=f"missing in the run folder: {', '.join(missing)}")
    addresses["checkpoints"], addresses["tensorboard"] = find_checkpoints(folder), folder.tensorboard_url
    return Completed(message=folder_url, data={"folder": folder_url, "files": addresses})
