"""Curves and hyperparameters for MLflow (the extra `mlflow`)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from danling_core.results.values import flatten
from danling_core.writers.protocol import Event, told_end
from danling_core.writers.tensorboard import SCORE_TAG, curves_of, hyperparameters

ID_TAG = "danling.id"
_GROUP_TAG = "danling.group"
_PARAMS_AT_ONCE = 100  # the most that a server takes
_METRICS_AT_ONCE = 1000  # likewise
_PAUSE_SECONDS = 1.0
_LONGEST_PARAM = 6000  # characters, likewise
_ENDS = {"complete": "FINISHED", "interrupted": "KILLED"}


class MLflowWriter:
    """Logs `{split}/{metric}` at each result's index, the hyperparameters, and the final score.

    Curves inside an epoch, `{split}_steps/{name}`, are logged at the completed steps. A request takes as long as many
    steps: they are sent once a second, each with its own time, and at the end of an epoch.

    Server and credentials come from MLflow's own environment variables. A resumed run continues the MLflow
    run that carries its id as the tag "danling.id".

    Args:
        experiment: the MLflow experiment, made where it does not exist.
        run_id: tells the run from all others of the experiment; a resumed run gives the same again.
        config: the run's canonical config.
    """

    def __init__(
        self,
        experiment: str,
        run_id: str,
        name: str | None = None,
        group: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._entities: Any = import_module("mlflow.entities")
        self._client: Any = import_module("mlflow.tracking").MlflowClient()
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = self._client.create_experiment(experiment) if found is None else found.experiment_id
        tags = {ID_TAG: run_id, **({} if group is None else {_GROUP_TAG: group})}
        self._id = self._find_or_create(experiment_id, tags, name)
        self._index = 0
        self._waiting: list[Any] = []
        self._sent_at = time.monotonic()
        self._end = "FAILED"
        params = [
            self._entities.Param(key, str(value)[:_LONGEST_PARAM])
            for key, value in hyperparameters(config or {}).items()
        ]
        for start in range(0, len(params), _PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=params[start : start + _PARAMS_AT_ONCE])

    def on_event(self, event: Event) -> None:
        """Log a report inside an epoch, a finished epoch or evaluation; note the score and how the run ended."""
        if self._client is None:
            return
        kind = event.get("event")
        if kind == "progress":
            self._waiting += self._metrics(curves_of(event), event["step"])
            if time.monotonic() - self._sent_at >= _PAUSE_SECONDS:
                self._send()
        elif kind == "epoch_finished":
            self._index = int(event["index"])
            self._log(event["result"], self._index)
        elif kind == "evaluate_finished":
            self._log({"evaluation": event["result"]}, self._index)
        elif kind == "completed":
            score = (event.get("status") or {}).get("best_score")
            self._log({} if score is None else {SCORE_TAG: score}, self._index)
        self._end = _ENDS.get(told_end(event) or "", self._end)

    def add_scalar(self, tag: str, value: float, index: int) -> None:
        """One value of a curve, at `index`."""
        if self._client is not None:
            self._log({tag: value}, index)

    def flush(self) -> None:
        """Send what waits."""
        if self._client is not None:
            self._send()

    def close(self) -> None:
        """End the MLflow run, as failed unless it completed. A second call does nothing."""
        if self._client is not None:
            self._send()
            client, self._client = self._client, None
            client.set_terminated(self._id, self._end)

    def _log(self, result: Mapping[str, Any], index: int) -> None:
        self._waiting += self._metrics(result, index)
        self._send()

    def _metrics(self, result: Mapping[str, Any], index: int) -> list[Any]:
        now = int(time.time() * 1000)
        return [
            self._entities.Metric(tag, float(value), now, index) for tag, value in flatten(result).items()
        ]

    def _send(self) -> None:
        """Send what waits in as few requests as the server takes: the loop waits for them."""
        waiting, self._waiting = self._waiting, []
        self._sent_at = time.monotonic()
        for start in range(0, len(waiting), _METRICS_AT_ONCE):
            self._client.log_batch(self._id, metrics=waiting[start : start + _METRICS_AT_ONCE])

    def _find_or_create(self, experiment_id: str, tags: dict[str, str], name: str | None) -> str:
        runs = self._client.search_runs([experiment_id], f"tags.`{ID_TAG}` = '{tags[ID_TAG]}'", max_results=1)
        if not runs:
            return str(self._client.create_run(experiment_id, tags=tags, run_name=name).info.run_id)
        found = str(runs[0].info.run_id)
        self._client.update_run(found, status="RUNNING")
        return found
