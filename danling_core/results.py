"""What a run reports: the history of its results, their scores, and which one is best."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from danling_core.errors import ConfigError, ScoreError
from danling_core.json_safe import from_json_safe, to_json_safe
from danling_core.score_mode import ScoreMode, resolve_score_mode

Result = dict[str, dict[str, Any]]
"""{split: {metric: value}}; a value is a float, or a mapping of floats for multi-task metrics."""


class Results:
    """The results of a run by index, with scores kept as they come.

    An index is the number of an epoch, or in step mode of the completed steps. Nothing here grows but the history.

    Args:
        score_split: the split whose metric is the score. Without it: val, else validate, else the second split, else
            the first. An index that lacks this split has no score.
        score_name: the metric; nested ones are named by their path, as in "task/accuracy".
        score_mode: whether smaller ("min") or larger ("max") is better; known for the common metrics.

    Raises:
        ConfigError: where `score_mode` is neither given nor known.
    """

    def __init__(
        self, score_split: str | None = None, score_name: str = "loss", score_mode: ScoreMode | None = None
    ) -> None:
        self.score_name = score_name
        self.score_mode: Literal["min", "max"] = resolve_score_mode(score_name, score_mode)
        self._stated_split = score_split
        self._history: dict[int, Result] = {}
        self._scores: dict[int, float] = {}
        self._splits: list[str] = []
        self._best_index: int | None = None

    # What was reported

    @property
    def history(self) -> dict[int, Result]:
        """{index: {split: {metric: value}}} in order of index. Change it through `append` and `truncate` only."""
        return self._history

    @property
    def latest_index(self) -> int | None:
        """The largest index reported; None before the first result."""
        return next(reversed(self._history), None)

    @property
    def latest_result(self) -> dict[str, Any] | None:
        """The latest result with its `index`: {"index": 3, "train": {...}, "val": {...}}; a copy."""
        return self._with_index(self.latest_index)

    @property
    def best_result(self) -> dict[str, Any] | None:
        """The best result with its `index`; None while nothing has a score that can be best."""
        return self._with_index(self._best_index)

    # How good it was

    @property
    def score_split(self) -> str | None:
        """The split that scores are taken from: the stated one, else the fallback among those known so far."""
        if self._stated_split is not None:
            return self._stated_split
        return fallback_split(self._splits)

    @property
    def scores(self) -> dict[int, float]:
        """{index: score}, for each index that reports the score split; NaN included."""
        return self._scores

    @property
    def latest_score(self) -> float | None:
        """The score of the latest index; None where it has none."""
        return self._scores.get(self.latest_index) if self.latest_index is not None else None

    @property
    def best_score(self) -> float | None:
        """The best score; None while there is none but NaN."""
        return None if self._best_index is None else self._scores[self._best_index]

    @property
    def best_index(self) -> int | None:
        """The index of the best score: compared exactly, the earliest wins a tie, NaN is never best."""
        return self._best_index

    @property
    def best_fn(self) -> Callable[..., Any]:
        """Python's own `min` or `max`, whichever picks the better of two scores."""
        return min if self.score_mode == "min" else max

    @property
    def is_best(self) -> bool:
        """Whether the latest index is the best one."""
        return self._best_index is not None and self._best_index == self.latest_index

    def should_stop(self, patience: int | None) -> bool:
        """Whether `patience` or more scored results came after the best one (None: never).

        A NaN counts as a result that is not better; an index without a score does not count.
        """
        if patience is None:
            return False
        if patience < 1:
            raise ConfigError(
                f"patience is {patience}, and must be at least 1, or null for no early stopping"
            )
        since_best = 0
        for index in reversed(self._scores):
            if index == self._best_index:
                return False
            since_best += 1
            if since_best >= patience:
                return True
        return False

    # How it changes

    def resolve_split(self, splits: Sequence[str]) -> str:
        """State the score split once the splits that will be evaluated are known; returns it.

        Called once, before the first result, by whoever knows the splits: until then a fallback may change as new
        splits are reported, and all scores with it.

        Raises:
            ConfigError: where a stated split is not among `splits`, or there are none.
        """
        split = self._stated_split if self._stated_split is not None else fallback_split(splits)
        if split is None:
            raise ConfigError("there is no split to take the score from: give at least one dataset")
        if split not in splits:
            raise ConfigError(
                f"score_split is {split!r}, but the splits are {list(splits)}{_hint(split, splits)}"
            )
        if split != self.score_split:
            self._rebuild(stated_split=split)
        self._stated_split = split
        return split

    def append(self, result: Mapping[str, Any], index: int) -> None:
        """Report {split: {metric: value}} at `index`, merging into what that index already has.

        Values are converted by `float` once (a tensor on a GPU is waited for here). Values given again replace.

        Raises:
            ScoreError: where the score split does not report `score_name`; nothing has changed then.
            ConfigError: where the result does not have this shape.
        """
        if isinstance(index, bool) or not isinstance(index, int):
            raise ConfigError(f"a result's index is an integer, got {index!r}")
        added = _plain(result)
        merged = _merge(self._history.get(index, {}), added)
        splits = [*self._splits, *(split for split in added if split not in self._splits)]
        split = self._stated_split if self._stated_split is not None else fallback_split(splits)
        is_rescored = split != self.score_split
        score = self._score_of(merged, split, is_final=self._is_final(splits, index))
        if is_rescored:
            self._rebuild(history={**self._history, index: merged}, splits=splits)
            return
        self._splits = splits
        _put(self._history, index, merged)
        if score is not None:
            self._put_score(index, score)

    def truncate(self, after_index: int | None) -> None:
        """Forget every result beyond `after_index` (None: all of them), as when a checkpoint older than them is restored."""
        kept = {
            index: result
            for index, result in self._history.items()
            if after_index is not None and index <= after_index
        }
        if len(kept) < len(self._history):
            self._rebuild(history=kept)

    # How it is kept

    def state_dict(self) -> dict[str, Any]:
        """The history as plain dicts and floats, a copy: all that a checkpoint needs, since scores follow from it."""
        return {"history": {index: _merge({}, result) for index, result in self._history.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything by what `state_dict` returned."""
        history = {int(index): _plain(result) for index, result in state["history"].items()}
        self._rebuild(history=history)

    def to_json(self) -> dict[str, Any]:
        """The history as a JSON value: keys are text, NaN is "NaN"."""
        json_value: dict[str, Any] = to_json_safe(self._history)
        return json_value

    @classmethod
    def from_json(
        cls,
        value: Mapping[str, Any] | str,
        score_split: str | None = None,
        score_name: str = "loss",
        score_mode: ScoreMode | None = None,
    ) -> Results:
        """Results from what `to_json` returned, or from its text: keys are integers again, "NaN" is NaN again."""
        results = cls(score_split, score_name, score_mode)
        results.load_state_dict({"history": history_from_json(value)})
        return results

    # Inside

    def _with_index(self, index: int | None) -> dict[str, Any] | None:
        return None if index is None else {"index": index, **_merge({}, self._history[index])}

    def _is_final(self, splits: Sequence[str], index: int) -> bool:
        """Whether the score split can no longer turn out to be another: only then is a missing metric an error.

        A first result that holds one split only, such as train, may be followed by the one that matters.
        """
        if self._stated_split is not None or len(splits) > 1:
            return True
        return splits[:1] in (["val"], ["validate"]) or any(known != index for known in self._history)

    def _score_of(self, result: Result, split: str | None, is_final: bool) -> float | None:
        if split is None or split not in result:
            return None
        metrics = flatten(result[split])
        if self.score_name in metrics:
            return metrics[self.score_name]
        if not is_final:
            return None
        known = list(metrics)
        raise ScoreError(
            f"score_name is {self.score_name!r}, but split {split!r} reports {known}{_hint(self.score_name, known)}"
        )

    def _put_score(self, index: int, score: float) -> None:
        was = self._scores.get(index)
        _put(self._scores, index, score)
        if index == self._best_index and was != score:
            self._best_index = best_index_of(self._scores, self.score_mode)
        elif self._is_better(index, score):
            self._best_index = index

    def _is_better(self, index: int, score: float) -> bool:
        if math.isnan(score):
            return False
        if self._best_index is None:
            return True
        best = self._scores[self._best_index]
        if score == best:
            return index < self._best_index
        return score < best if self.score_mode == "min" else score > best

    def _rebuild(
        self,
        history: Mapping[int, Result] | None = None,
        splits: Iterable[str] | None = None,
        stated_split: str | None = None,
    ) -> None:
        """Score everything anew: after a restore, or when the score split becomes another. Raises before it changes."""
        entries = dict(sorted((self._history if history is None else history).items()))
        known = list(dict.fromkeys(split for result in entries.values() for split in result))
        if splits is not None:
            known = list(splits)
        split = stated_split if stated_split is not None else self._stated_split
        split = split if split is not None else fallback_split(known)
        found = {index: self._score_of(result, split, is_final=False) for index, result in entries.items()}
        if len(entries) and split is not None and all(score is None for score in found.values()):
            last = next((result for result in reversed(entries.values()) if split in result), None)
            self._score_of(last or {}, split, is_final=len(known) > 1 or len(entries) > 1)
        self._history, self._splits = entries, known
        self._scores = {index: score for index, score in found.items() if score is not None}
        self._best_index = best_index_of(self._scores, self.score_mode)


def best_index_of(scores: Mapping[int, float], score_mode: ScoreMode) -> int | None:
    """The index of the best score; the earliest of equals, never one of NaN."""
    numbers = {index: score for index, score in scores.items() if not math.isnan(score)}
    if not numbers:
        return None
    best = (min if score_mode == "min" else max)(numbers.values())
    return min(index for index, score in numbers.items() if score == best)


def fallback_split(splits: Sequence[str]) -> str | None:
    """The split to score by where none is stated: val, validate, the second, the first."""
    for name in ("val", "validate"):
        if name in splits:
            return name
    return (splits[1] if len(splits) > 1 else splits[0]) if splits else None


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics as {"task/accuracy": value}."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{path}/"))
        else:
            flat[path] = value
    return flat


def history_from_json(value: Mapping[str, Any] | str) -> dict[int, Result]:
    """A history read back from JSON (a value or its text): keys are integers again, "NaN" is NaN again."""
    data = json.loads(value) if isinstance(value, str) else value
    return {int(index): from_json_safe(result) for index, result in data.items()}


def _plain(result: Mapping[str, Any]) -> Result:
    if not isinstance(result, Mapping):
        raise ConfigError(f"a result is {{split: {{metric: value}}}}, got a {type(result).__name__}")
    plain: Result = {}
    for split, metrics in result.items():
        if not isinstance(split, str) or not isinstance(metrics, Mapping):
            raise ConfigError(f"a result is {{split: {{metric: value}}}}, got {split!r}: {metrics!r}")
        if split == "index":
            raise ConfigError(
                "a split cannot be called 'index': `latest_result` and `best_result` use that key"
            )
        plain[split] = _floats(metrics, split)
    return plain


def _floats(metrics: Mapping[str, Any], path: str) -> dict[str, Any]:
    floats: dict[str, Any] = {}
    for name, value in metrics.items():
        here = f"{path}/{name}"
        if isinstance(value, Mapping):
            floats[str(name)] = _floats(value, here)
            continue
        if isinstance(value, str):
            raise ConfigError(f"metric {here!r} must be one number, got the text {value!r}")
        try:
            floats[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"metric {here!r} must be one number, got {value!r}") from error
    return floats


def _merge(base: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    merged = {
        name: _merge(value, {}) if isinstance(value, Mapping) else value for name, value in base.items()
    }
    for name, value in added.items():
        if isinstance(value, Mapping):
            below = merged.get(name)
            merged[name] = _merge(below if isinstance(below, Mapping) else {}, value)
        else:
            merged[name] = value
    return merged


def _put(by_index: dict[int, Any], index: int, value: Any) -> None:
    """Set one entry and keep the order of indices; only one that comes out of order costs a sort."""
    is_in_order = index in by_index or not by_index or index > next(reversed(by_index))
    by_index[index] = value
    if not is_in_order:
        entries = sorted(by_index.items())
        by_index.clear()
        by_index.update(entries)


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
