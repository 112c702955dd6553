"""Outcome of a run, as small JSON: what flows return and leaderboards rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from danling_core.results.formatting import format_value
from danling_core.runs.folder import RunFolder, Status

_MOST_NAMED = 10

Ending = Literal["complete", "failed", "interrupted", "refused"]


@dataclass(frozen=True)
class RunOutcome:
    """Outcome of one run.

    Args:
        status: `refused` is a run that could not start, because another process owns it or its folder.
        skipped: it was complete already, and nothing was trained.
        score: the best score, at `best_index`; None when there is none yet.
        evaluation: `{split: {metric: value}}` of the evaluate stage.
        seconds: training time over all attempts.
        folder: URL of the run folder.
        error: one line; None when complete. With `status` complete, what is left beside the stages asked for.
        traceback: of the first failing rank, where there is one.
        is_bad_input: a rank refused what the user gave, before its first step.
    """

    status: Ending
    name: str
    id: str
    folder: str | None = None
    skipped: bool = False
    experiment_name: str | None = None
    run_name: str | None = None
    group: str | None = None
    score: float | None = None
    score_name: str | None = None
    score_split: str | None = None
    score_mode: str | None = None
    best_index: int | None = None
    epochs: int = 0
    steps: int = 0
    seconds: float = 0.0
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    traceback: str | None = None
    rank: int | None = None
    is_bad_input: bool = False

    @property
    def key(self) -> str:
        """Name and id: one per run of a session."""
        return f"{self.name}-{self.id}"

    def dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_status(cls, record: Status, folder: RunFolder, **changes: Any) -> RunOutcome:
        """Make the outcome from a run folder's status, with `changes` on top."""
        stated = {
            "status": "interrupted" if record.status == "running" else record.status,
            "folder": folder.url,
            "score": record.best_score,
            "evaluation": record.evaluation or {},
            **{name: getattr(record, name) for name in _SHARED},
        }
        return cls(**{**stated, **changes})


def summarise(bad: Sequence[RunOutcome], total: int) -> str:
    """One line that names the runs that failed, and why: the first of them, where there are many."""
    named = "; ".join(f"{outcome.key}: {_one_line(outcome.error)}" for outcome in bad[:_MOST_NAMED])
    more = f"; and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
    return f"{len(bad)} of {total} runs failed: {named}{more}"


def describe(outcome: RunOutcome) -> str:
    """Describe how a run ended, in one line."""
    if outcome.status == "complete":
        if outcome.error is not None:
            return f"the stages asked for are done, and the run is not complete: {_one_line(outcome.error)}"
        how = "complete already" if outcome.skipped else "complete"
        if outcome.score is None:
            return how
        return f"{how}: {outcome.score_name} {format_value(outcome.score)} at {outcome.best_index}"
    if outcome.status == "interrupted":
        return (
            f"interrupted after {outcome.epochs} epochs; run it again to resume ({_one_line(outcome.error)})"
        )
    return _one_line(outcome.error)


def _one_line(text: str | None) -> str:
    return (text or "no reason given").strip().splitlines()[0]


_SHARED = (
    *("name", "id", "experiment_name", "run_name", "group", "score_name", "score_split", "score_mode"),
    *("best_index", "epochs", "steps", "seconds", "error"),
)
