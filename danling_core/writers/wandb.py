"""Curves and hyperparameters for Weights & Biases (the extra `wandb`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from danling_core.results.values import flatten
from danling_core.writers.protocol import Event, told_end
from danling_core.writers.tensorboard import SCORE_TAG, curves_of


class WandbWriter:
    """Logs `{split}/{metric}` against the result's index, and the score in the summary.

    Curves inside an epoch, `{split}_steps/{name}`, are logged against the completed steps.

    The run keeps its id through resumes, so that W&B continues it. Credentials are W&B's own business (its
    environment variables and its login); nothing of them passes through here. It is told of no source, command
    or console: those are in the run's folder.

    Args:
        project: the W&B project, such as the experiment's name.
        run_id: tells the run from all others of the project; a resumed run gives the same again.
        config: the run's canonical config.
        log_dir: a local folder for W&B's own files, where WANDB_DIR names none.
    """

    def __init__(
        self,
        project: str,
        run_id: str,
        name: str | None = None,
        group: str | None = None,
        config: Mapping[str, Any] | None = None,
        log_dir: str | None = None,
    ) -> None:
        wandb: Any = import_module("wandb")
        self._run: Any = wandb.init(
            project=project,
            id=run_id,
            name=name,
            group=group,
            config=dict(config or {}),
            dir=os.environ.get("WANDB_DIR", log_dir),
            resume="allow",
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True, x_disable_meta=True
            ),
        )
        self._run.define_metric("*", step_metric="index")
        self._splits: set[str] = set()
        self._exit_code = 1

    def on_event(self, event: Event) -> None:
        """Log a report inside an epoch, a finished epoch or evaluation; note the score and how the run ended."""
        if self._run is None:
            return
        kind = event.get("event")
        if kind == "progress":
            self._log_steps(f"{event['split']}_steps", curves_of(event), event["step"])
        elif kind == "epoch_finished":
            self._run.log({"index": event["index"], **_numbers(event["result"])})
        elif kind == "evaluate_finished":
            self._run.summary.update(_numbers({"evaluation": event["result"]}))
        elif kind == "completed":
            self._run.summary[SCORE_TAG] = (event.get("status") or {}).get("best_score")
            self._exit_code = 0 if told_end(event) == "complete" else 1

    def add_scalar(self, tag: str, value: float, index: int) -> None:
        """One value of a curve, against `index`; of one inside an epoch, against the completed steps."""
        split = tag.partition("/")[0]
        if self._run is not None and split.endswith("_steps"):
            self._log_steps(split, {tag: float(value)}, index)
        elif self._run is not None:
            self._run.log({"index": index, tag: float(value)})

    def flush(self) -> None:
        """Do nothing: W&B uploads in a process of its own."""

    def close(self) -> None:
        """Finish the run, as failed unless it completed. A second call does nothing."""
        if self._run is not None:
            run, self._run = self._run, None
            run.finish(exit_code=self._exit_code)

    def _log_steps(self, split: str, values: Mapping[str, float], step: int) -> None:
        if split not in self._splits:
            self._run.define_metric(f"{split}/*", step_metric="steps")
            self._splits.add(split)
        self._run.log({"steps": step, **values})


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    return {tag: float(value) for tag, value in flatten(result).items()}
