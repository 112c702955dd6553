"""What a runner says of its results: lines for people, curves for TensorBoard, files for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from danling_core.results.formatting import format_epoch_result, format_result, format_step_result
from danling_core.runner.base import RunnerMode
from danling_core.runner.methods import Values
from danling_core.runner.views import RunnerViews

if TYPE_CHECKING:
    from danling_core.session.files import RunFiles
    from danling_core.writers.services import Service


class Reporting(RunnerViews):
    """Results, reported."""

    _files: RunFiles | None
    _log: Any
    _services: Sequence[Service] = ()
    _speaker: int = 0

    def append_result(self, result: Mapping[str, Any], index: int | None = None) -> None:
        self._results.append(result, self.epochs if index is None else index)

    def save_result(self) -> None:
        if self._files is not None:
            self._files.write_results(self._results, self._identity_fields())
            self._files.write_status(**self._status_fields())

    def _identity_fields(self) -> dict[str, str]:
        return {"name": self.name, "id": self.id, "timestamp": self.timestamp}

    def _status_fields(self) -> Values:
        """How far the run is and how good, for status.json."""
        return {
            "epochs": self.epochs,
            "steps": self.steps,
            "iters": self.iters,
            "progress": self.progress,
            "score_split": self.score_split,
            "score_name": self.score_name,
            "score_mode": self._results.score_mode,
            "best_index": self.best_index,
            "best_score": self.best_score,
            "latest_score": self.latest_score,
            "seconds": self._progress.seconds,
        }

    def emit(self, kind: str, **fields: Any) -> None:
        if self._files is not None:
            self._files.emit(kind, **fields)

    # lines --------------------------------------------------------------------------------------------------
    def print_result(self) -> None:
        if self.is_main_process:
            self.logger.info("%s", self.format_result())

    def step_log(self, split: str, iteration: int, length: int | None = None) -> Values:
        result = self.get_step_result()
        self.logger.info("%s", self.format_step_result(result, split, iteration, length))
        if self.mode is RunnerMode.train:
            self.write_result(result, split)
        return result

    def format_step_result(
        self,
        result: Mapping[str, Any],
        split: str = "train",
        steps: int | None = None,
        length: int | None = None,
    ) -> str:
        return format_step_result(result, split, steps, length)

    def format_epoch_result(
        self, result: Mapping[str, Any], epochs: int | None = None, total: int | None = None
    ) -> str:
        return format_epoch_result(result, epochs, total)

    def format_result(self, result: Mapping[str, Any] | None = None) -> str:
        return format_result(self._results if result is None else result)

    def init_print(self, process: int = 0) -> None:
        self._speaker = process
        if self._log is not None:
            self._log.process = process

    # curves -------------------------------------------------------------------------------------------------
    def write_result(self, result: Mapping[str, Any], split: str, steps: int | None = None) -> None:
        for name, value in _expanded(result):
            self.write_score(name, value, split, steps)

    def write_score(self, name: str, score: float, split: str, steps: int | None = None) -> None:
        for writer in (self.writer, *self._services):
            if writer is not None:
                writer.add_scalar(f"{split}/{name}", float(score), self.steps if steps is None else steps)


def _expanded(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """The numbers in nested maps and lists, each with its path: `accuracy/0`. A tensor of several is a list."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, Sequence) and not isinstance(value, str):
        items = enumerate(value)
    else:
        return [(name, value)]
    return [pair for key, item in items for pair in _expanded(item, f"{name}/{key}" if name else str(key))]
