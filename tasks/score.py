"""The score task: the run's best score, as its row of a leaderboard."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from danling_core.results.formatting import format_value
from danling_core.runs.folder import RunFolder


@task(name="score", task_run_name="score", cache_policy=NO_CACHE, persist_result=False)
def score(folder_url: str) -> State[dict[str, Any]]:
    """Read the score that the ranks left in the run folder; nothing is computed here."""
    status = RunFolder(folder_url).read_status()
    if status is None or status.best_score is None:
        return Completed(message="no score yet", data={"score": None})
    split = f"{status.score_split} " if status.score_split else ""
    message = f"{split}{status.score_name} {format_value(status.best_score)} at {status.best_index}"
    row = {"score": status.best_score, "best_index": status.best_index, "score_name": status.score_name}
    return Completed(message=message, data=row)
