"""History of a run's results, their scores, and which one is best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from danling_core.errors import ConfigError, ScoreError
from danling_core.results.scoring import (
    ScoreMode,
    best_index_of,
    fallback_split,
    is_better,
    resolve_score_mode,
)
from danling_core.results.values import Result, flatten, history_from_json, merge, plain_result
from danling_core.storage.json_safe import to_json_safe
from danling_core.suggest import nearest


class Results:
    """The results of a run by index, with scores kept as they come.

    An index is the number of an epoch, or in step mode of the completed steps. Values are floats, however
    they were reported; timings do not belong here, so that a run that is repeated reports the same.

    Args:
        score_split: the split whose metric is the score. Without it: val, else validate, the second, the
            first. An index that lacks this split has no score.
        score_name: the metric; nested ones are named by their path, as in "task/accuracy".
        score_mode: whether smaller ("min") or larger ("max") is better; known for the common metrics.

    Raises:
        ConfigError: where `score_mode` is neither given nor known.
    """

    def __init__(
        self, score_split: str | None = None, score_name: str = "loss", score_mode: ScoreMode | None = None
    ) -> None:
        self.score_name = score_name
        self.score_mode: ScoreMode = resolve_score_mode(score_name, score_mode)
        self._stated_split = score_split
        self._history: dict[int, Result] = {}
        self._scores: dict[int, float] = {}
        self._splits: list[str] = []
        self._best_index: int | None = None

    # Reported

    @property
    def history(self) -> dict[int, Result]:
        """Return {index: {split: {metric: value}}}, in order. Change it through `append` only."""
        return self._history

    @property
    def latest_index(self) -> int | None:
        """Return the largest index reported; None before the first result."""
        return next(reversed(self._history), None)

    @property
    def latest_result(self) -> dict[str, Any] | None:
        """Return the latest result with its index, a copy: {"index": 3, "train": {...}, "val": {...}}."""
        return self._with_index(self.latest_index)

    @property
    def best_result(self) -> dict[str, Any] | None:
        """Return the best result with its index, a copy; None while nothing has a score that can be best."""
        return self._with_index(self._best_index)

    # How good it was

    @property
    def score_split(self) -> str | None:
        """Return the split that scores are taken from: the stated one, else the fallback among those reported."""
        return self._split_among(self._splits)

    @property
    def scores(self) -> dict[int, float]:
        """Return {index: score}, for each index that reports the score split; NaN included."""
        return self._scores

    @property
    def latest_score(self) -> float | None:
        """Return the score of the latest index; None where it has none."""
        return None if self.latest_index is None else self._scores.get(self.latest_index)

    @property
    def best_score(self) -> float | None:
        """Return the best score; None while there is none but NaN."""
        return None if self._best_index is None else self._scores[self._best_index]

    @property
    def best_index(self) -> int | None:
        """Return the index of the best score: compared exactly, the earliest wins a tie, NaN is never best."""
        return self._best_index

    @property
    def best_fn(self) -> Callable[..., Any]:
        """Return Python's own `min` or `max`, whichever picks the better of two scores."""
        return min if self.score_mode == "min" else max

    @property
    def is_best(self) -> bool:
        """Return whether the latest index is the best one."""
        return self._best_index is not None and self._best_index == self.latest_index

    def should_stop(self, patience: int | None) -> bool:
        """Return whether `patience` or more scored results came after the best one; never, where it is None.

        A NaN counts as a result that is not better; an index without a score does not count.
        """
        if patience is None:
            return False
        if patience < 1:
            raise ConfigError(f"patience is {patience}: it must be at least 1, or null for no early stopping")
        since_best = takewhile(lambda index: index != self._best_index, reversed(self._scores))
        return sum(1 for _ in since_best) >= patience

    # How it changes

    def resolve_split(self, splits: Sequence[str]) -> str:
        """State the score split, once the splits that will be reported are known; returns it.

        Call it before the first result: until then a fallback may become another as new splits are reported,
        and all scores with it.

        Raises:
            ConfigError: where a stated split is not among `splits`, or there are none.
        """
        split = self._split_among(splits)
        if split is None:
            raise ConfigError("there is no split to take the score from: give at least one dataset")
        if split not in splits:
            raise ConfigError(f"score_split is {split!r}, but the splits are {_known(split, splits)}")
        was, self._stated_split = self.score_split, split
        if split != was:
            self._replace(self._history)
        return split

    def append(self, result: Mapping[str, Any], index: int) -> None:
        """Report {split: {metric: value}} at `index`, merging into what that index already has.

        A value that is given again replaces the old one; the score and the best follow.

        Raises:
            ScoreError: where the score split does not report `score_name`; nothing has changed then.
            ConfigError: where the result does not have this shape.
        """
        if isinstance(index, bool) or not isinstance(index, int):
            raise ConfigError(f"the index of a result is an integer, got {index!r}")
        added = plain_result(result)
        merged: Result = merge(self._history.get(index, {}), added)
        splits = [*self._splits, *(split for split in added if split not in self._splits)]
        split = self._split_among(splits)
        is_settled = self._is_settled(splits, is_first=all(known == index for known in self._history))
        score = self._score_of(merged, split, must_exist=is_settled)
        if split != self.score_split:
            self._replace({**self._history, index: merged})
            return
        self._splits = splits
        _put(self._history, index, merged)
        if score is not None:
            self._put_score(index, score)

    # How it is kept

    def state_dict(self) -> dict[str, Any]:
        """Return the history as plain dicts and floats, a copy: scores and best follow from it."""
        return {"history": {index: merge(result, {}) for index, result in self._history.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything by what `state_dict` returned.

        Raises:
            ScoreError: where the latest result does not report `score_name` in the score split.
        """
        self._replace({int(index): plain_result(result) for index, result in state["history"].items()})
        if self.latest_index is not None:
            is_settled = self._is_settled(self._splits, is_first=len(self._history) == 1)
            self._score_of(self._history[self.latest_index], self.score_split, must_exist=is_settled)

    def to_json(self) -> dict[str, Any]:
        """Return the history as a JSON value: keys are text, NaN is "NaN"."""
        value: dict[str, Any] = to_json_safe(self._history)
        return value

    @classmethod
    def from_json(
        cls,
        value: Mapping[str, Any] | str,
        score_split: str | None = None,
        score_name: str = "loss",
        score_mode: ScoreMode | None = None,
    ) -> Results:
        """Return results from what `to_json` returned, or its text: keys are integers again, "NaN" is NaN."""
        results = cls(score_split, score_name, score_mode)
        results.load_state_dict({"history": history_from_json(value)})
        return results

    # Inside

    def _with_index(self, index: int | None) -> dict[str, Any] | None:
        return None if index is None else {"index": index, **merge(self._history[index], {})}

    def _split_among(self, splits: Sequence[str]) -> str | None:
        return fallback_split(splits) if self._stated_split is None else self._stated_split

    def _is_settled(self, splits: Sequence[str], is_first: bool) -> bool:
        """Return whether the score split can no longer become another: only then is a missing metric an error.

        A first result that has one split only, such as train, may be followed by the one that matters.
        """
        return self._stated_split is not None or len(splits) > 1 or splits == ["val"] or not is_first

    def _score_of(self, result: Result, split: str | None, must_exist: bool) -> float | None:
        if split is None or split not in result:
            return None
        metrics = flatten(result[split])
        if self.score_name in metrics:
            return float(metrics[self.score_name])
        if not must_exist:
            return None
        known = _known(self.score_name, metrics)
        raise ScoreError(f"score_name is {self.score_name!r}, but split {split!r} reports {known}")

    def _put_score(self, index: int, score: float) -> None:
        _put(self._scores, index, score)
        best = self._best_index
        if index == best:
            self._best_index = best_index_of(self._scores, self.score_mode)
        elif math.isnan(score):
            return
        elif best is None or is_better(score, self._scores[best], self.score_mode):
            self._best_index = index
        elif score == self._scores[best]:
            self._best_index = min(index, best)

    def _replace(self, history: Mapping[int, Result]) -> None:
        """Take this history and score it anew: after a restore, or when the score split becomes another."""
        self._history = dict(sorted(history.items()))
        self._splits = list(dict.fromkeys(split for result in self._history.values() for split in result))
        self._scores = {}
        for index, result in self._history.items():
            score = self._score_of(result, self.score_split, must_exist=False)
            if score is not None:
                self._scores[index] = score
        self._best_index = best_index_of(self._scores, self.score_mode)


def _put(by_index: dict[int, Any], index: int, value: Any) -> None:
    """Set one entry and keep the order of indices; only one that comes out of order costs a sort."""
    is_in_order = index in by_index or not by_index or index > next(reversed(by_index))
    by_index[index] = value
    if not is_in_order:
        entries = sorted(by_index.items())
        by_index.clear()
        by_index.update(entries)


def _known(wanted: str, names: Iterable[str]) -> str:
    names = list(names)
    near = nearest(wanted, names)
    return f"{names}" if near is None else f"{names}; did you mean {near!r}?"
