"""Curves and hyperparameters for MLflow (an optional extra)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from danling_core.errors import ConfigError
from danling_core.result_values import flatten
from danling_core.writers.protocol import Event
from danling_core.writers.tensorboard import SCORE_TAG, hyperparameters

ID_TAG = "danling.id"


class MLflowWriter:
    """Logs `{split}/{metric}` at each result's index, the hyperparameters, and the final score.

    Server and credentials come from MLflow's own environment variables. A resumed run continues the MLflow
    run that carries its id as the tag "danling.id".

    Args:
        experiment: the MLflow experiment, made where it does not exist.
        run_id: the run's `id`.

    Raises:
        ConfigError: where mlflow is not installed.
    """

    def __init__(
        self,
        experiment: str,
        run_id: str,
        *,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        tracking_uri: str | None = None,
    ) -> None:
        try:
            tracking: Any = import_module("mlflow.tracking")
        except ImportError as error:
            raise ConfigError(
                "logging to MLflow needs the package mlflow: pip install mlflow-skinny"
            ) from error
        self._client: Any = tracking.MlflowClient(tracking_uri)
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = self._client.create_experiment(experiment) if found is None else found.experiment_id
        self._id = self._find_or_create(experiment_id, run_id, name)
        self._index = 0
        self._end = "FAILED"
        for key, value in hyperparameters(config or {}).items():
            self._client.log_param(self._id, key, value)

    def on_event(self, event: Event) -> None:
        """Log a finished epoch or evaluation; note the score and how the run ended."""
        if self._client is None:
            return
        kind = event.get("event")
        if kind == "epoch_finished":
            self._index = int(event["index"])
            self._log(event["result"])
        elif kind == "evaluate_finished":
            self._log({"evaluation": event["result"]})
        elif kind == "completed":
            score = (event.get("status") or {}).get("best_score")
            self._log({} if score is None else {SCORE_TAG: score})
            self._end = "FINISHED"
        elif kind == "interrupted":
            self._end = "KILLED"

    def flush(self) -> None:
        """Nothing to do: every value is sent when it is logged."""

    def close(self) -> None:
        """End the MLflow run, as failed unless it completed. A second call does nothing."""
        if self._client is not None:
            self._client.set_terminated(self._id, self._end)
            self._client = None

    def _log(self, result: Mapping[str, Any]) -> None:
        for tag, value in flatten(result).items():
            self._client.log_metric(self._id, tag, float(value), step=self._index)

    def _find_or_create(self, experiment_id: str, run_id: str, name: str | None) -> str:
        runs = self._client.search_runs([experiment_id], f"tags.`{ID_TAG}` = '{run_id}'", max_results=1)
        if not runs:
            return str(
                self._client.create_run(experiment_id, tags={ID_TAG: run_id}, run_name=name).info.run_id
            )
        found = str(runs[0].info.run_id)
        self._client.update_run(found, status="RUNNING")
        return found
