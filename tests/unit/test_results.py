"""Results: history, scores, best, latest."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from danling_core.errors import ConfigError, ScoreError
from danling_core.results.history import Results
from danling_core.results.scoring import best_index_of, resolve_score_mode


def with_scores(*scores: float, name: str = "loss") -> Results:
    results = Results("val", name)
    for index, score in enumerate(scores):
        results.append({"train": {"loss": 1.0}, "val": {name: score}}, index)
    return results


def test_index_zero_is_an_index_and_a_score_of_zero_is_a_score() -> None:
    results = with_scores(0.0, 1.0)
    assert (results.best_index, results.best_score, results.latest_index) == (0, 0.0, 1)
    assert results.best_result == {"index": 0, "train": {"loss": 1.0}, "val": {"loss": 0.0}}
    assert results.latest_result == {"index": 1, "train": {"loss": 1.0}, "val": {"loss": 1.0}}


def test_without_results_there_is_no_latest_and_no_best() -> None:
    results = Results()
    assert results.latest_result is results.best_result is results.latest_score is results.best_score is None
    assert results.best_index is results.latest_index is None
    assert not results.is_best and not results.should_stop(1)


@pytest.mark.parametrize(("name", "best"), [("loss", 1), ("accuracy", 0), ("task/top5_accuracy", 0)])
def test_the_direction_follows_the_metric(name: str, best: int) -> None:
    results = Results("val", name)
    for index, score in enumerate([0.9, 0.1, 0.5]):
        results.append({"val": {"task": {"top5_accuracy": score}, "loss": score, "accuracy": score}}, index)
    assert results.best_index == best
    assert results.best_fn(results.scores.values()) == results.best_score


@pytest.mark.holds("bugs-7")
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(
            (name, "min")
            for name in ("loss", "mse", "rmse", "mae", "error", "top1_error", "valLoss", "bits_per_byte")
        ),
        *((name, "min") for name in ("perplexity", "cross_entropy", "loss_ce", "negative_log_likelihood")),
        *(
            (name, "max")
            for name in ("accuracy", "acc1", "acc@5", "f1", "f1_macro", "AUROC", "r2", "mcc", "mean_iou")
        ),
        *((name, "max") for name in ("precision", "ndcg@10", "pearson", "bleu", "segmentation/dice")),
    ],
)
def test_common_metrics_have_a_known_direction(name: str, mode: str) -> None:
    assert resolve_score_mode(name) == mode


def test_an_unknown_metric_needs_a_stated_direction() -> None:
    with pytest.raises(ConfigError, match="set score_mode"):
        Results("val", "zorgness")
    assert Results("val", "zorgness", "max").best_fn is max
    with pytest.raises(ConfigError, match="'min' or 'max'"):
        Results("val", "loss", "lowest")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (["train", "test", "val"], "val"),
        (["train", "validate", "test"], "validate"),
        (["train", "dev", "test"], "dev"),
        (["train"], "train"),
    ],
)
def test_the_score_split_falls_back_to_val_validate_second_first(splits: list[str], expected: str) -> None:
    results = Results()
    results.append({split: {"loss": 1.0} for split in splits}, 0)
    assert results.score_split == expected
    assert Results().resolve_split(splits) == expected


def test_scores_move_to_the_split_that_matters_when_it_is_first_reported() -> None:
    results = Results(score_name="accuracy")
    results.append({"train": {"loss": 0.1}}, 0)
    results.append({"val": {"accuracy": 0.7}}, 0)
    assert results.scores == {0: 0.7} and results.is_best


def test_an_epoch_without_the_score_split_has_no_score() -> None:
    results = Results()
    results.resolve_split(["train", "val"])
    results.append({"train": {"loss": 0.1}}, 0)
    assert results.scores == {} and results.latest_score is None and not results.is_best
    results.append({"train": {"loss": 0.1}, "val": {"loss": 0.5}}, 1)
    results.append({"train": {"loss": 0.1}}, 2)
    assert results.scores == {1: 0.5} and results.best_index == 1 and not results.is_best


def test_a_stated_split_must_exist() -> None:
    with pytest.raises(ConfigError, match="did you mean 'val'"):
        Results("vall").resolve_split(["train", "val"])
    with pytest.raises(ConfigError, match="no split"):
        Results().resolve_split([])


@pytest.mark.parametrize("results", [Results("val", "accuracy"), Results(None, "accuracy")])
def test_a_metric_that_is_not_reported_is_named_with_the_nearest_and_changes_nothing(
    results: Results,
) -> None:
    with pytest.raises(
        ScoreError, match=r"'accuracy', but split 'val' reports \['acuracy'\]; did you mean 'acuracy'"
    ):
        results.append({"train": {"loss": 1}, "val": {"acuracy": 1}}, 0)
    assert results.history == {} and results.scores == {}


def test_with_one_split_a_missing_metric_is_an_error_from_the_second_result_on() -> None:
    results = Results(None, "accuracy")
    results.append({"train": {"loss": 1.0}}, 0)
    with pytest.raises(ScoreError):
        results.append({"train": {"loss": 1.0}}, 1)


def test_nan_is_never_best_and_infinity_can_be() -> None:
    results = with_scores(math.nan, 2.0, math.nan)
    assert results.best_index == 1 and math.isnan(results.latest_score or 0) and not results.is_best
    assert with_scores(math.nan).best_index is None
    assert with_scores(0.5, math.inf, name="accuracy").best_index == 1


def test_the_earliest_wins_a_tie_and_comparison_is_exact() -> None:
    assert with_scores(0.5, 0.5, 0.5).best_index == 0
    assert with_scores(0.5, math.nextafter(0.5, 0)).best_index == 1
    results = Results("val")
    for index in (2, 0, 1):
        results.append({"val": {"loss": 0.5}}, index)
    assert results.best_index == 0 and list(results.history) == list(results.scores) == [0, 1, 2]


def test_merging_into_an_index_rescores_it() -> None:
    results = with_scores(0.5, 0.4, 0.45)
    results.append({"val": {"loss": 0.9, "extra": 1}}, 1)
    assert results.history[1] == {"train": {"loss": 1.0}, "val": {"loss": 0.9, "extra": 1.0}}
    assert results.best_index == 2 and results.is_best
    results.append({"test": {"loss": 7}}, 2)
    assert results.best_index == 2 and results.history[2]["val"] == {"loss": 0.45}
    results.append({"val": {"loss": math.nan}}, 2)
    assert results.best_index == 0


def test_incremental_bests_equal_those_of_a_full_scan() -> None:
    rng = np.random.default_rng(0)
    results = Results("val")
    for index in rng.integers(0, 40, size=400):
        score = rng.choice([math.nan, *np.linspace(0, 1, 6)])
        results.append({"val": {"loss": score}}, int(index))
        assert results.best_index == best_index_of(results.scores, "min")
        assert results.scores.keys() == results.history.keys()


@pytest.mark.holds("bugs-7")
def test_a_result_is_scored_once_however_long_the_history() -> None:
    calls = 0

    class Counting(Results):
        def _score_of(self, *args: object, **kwargs: object) -> float | None:
            nonlocal calls
            calls += 1
            return super()._score_of(*args, **kwargs)  # type: ignore[arg-type]

    results = Counting("val")
    for index in range(200):
        results.append({"val": {"loss": 1.0}}, index)
    assert calls == 200


def test_patience_counts_scored_results_since_the_best() -> None:
    results = with_scores(0.5, 0.6)
    assert not results.should_stop(2) and results.should_stop(1)
    results.append({"train": {"loss": 1}}, 2)
    assert not results.should_stop(2)
    results.append({"val": {"loss": math.nan}}, 3)
    assert results.should_stop(2) and not results.should_stop(3) and not results.should_stop(None)
    results.append({"val": {"loss": 0.1}}, 4)
    assert not results.should_stop(1)
    assert with_scores(math.nan, math.nan).should_stop(2)
    with pytest.raises(ConfigError, match="at least 1"):
        results.should_stop(0)


def test_values_become_floats_once() -> None:
    torch = pytest.importorskip("torch")
    results = Results("val")
    results.append(
        {"val": {"loss": torch.tensor(0.5, requires_grad=True), "n": np.float32(2), "t": {"a": 1}}}, 0
    )
    assert results.history == {0: {"val": {"loss": 0.5, "n": 2.0, "t": {"a": 1.0}}}}
    assert all(
        type(value) is float for value in (results.history[0]["val"]["loss"], results.history[0]["val"]["n"])
    )


@pytest.mark.parametrize(
    "result", [{"val": 1.0}, {"val": {"loss": [1, 2]}}, {"val": {"loss": "good"}}, [1], {3: {}}]
)
def test_a_result_of_another_shape_is_refused(result: object) -> None:
    with pytest.raises(ConfigError):
        Results().append(result, 0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'index'"):
        Results().append({"index": {"loss": 1}}, 0)
    with pytest.raises(ConfigError, match="integer"):
        Results().append({"val": {"loss": 1}}, "0")  # type: ignore[arg-type]


def test_what_is_returned_is_a_copy() -> None:
    results = with_scores(0.5)
    assert results.latest_result is not None
    results.latest_result["val"]["loss"] = 9.0
    results.state_dict()["history"][0]["val"]["loss"] = 9.0
    given = {"val": {"loss": 0.25}}
    results.append(given, 1)
    given["val"]["loss"] = 9.0
    assert results.scores == {0: 0.5, 1: 0.25} and results.history[1] == {"val": {"loss": 0.25}}
    assert results.history[0]["val"] == {"loss": 0.5}


def test_history_survives_json_with_integer_keys_and_nan() -> None:
    results = with_scores(0.5, math.nan, math.inf)
    text = json.dumps(results.to_json(), allow_nan=False)
    assert json.loads(text)["1"]["val"]["loss"] == "NaN"
    again = Results.from_json(text, "val")
    assert list(again.history) == [0, 1, 2] and math.isnan(again.history[1]["val"]["loss"])
    assert (again.best_index, again.best_score, again.latest_score) == (0, 0.5, math.inf)
    with pytest.raises(ScoreError):
        Results.from_json(text, "val", "accuracy")


def test_a_resumed_run_stops_as_one_never_interrupted() -> None:
    whole = with_scores(0.5, 0.4, 0.6, 0.7, 0.8)
    resumed = Results("val")
    resumed.load_state_dict(with_scores(0.5, 0.4, 0.6).state_dict())
    assert resumed.latest_index == 2 and not resumed.should_stop(2)
    resumed.append({"train": {"loss": 1.0}, "val": {"loss": 0.7}}, 3)
    assert resumed.should_stop(2)
    resumed.append({"train": {"loss": 1.0}, "val": {"loss": 0.8}}, 4)
    assert resumed.state_dict() == whole.state_dict() and resumed.scores == whole.scores
    assert resumed.best_index == whole.best_index


def test_replaying_an_index_with_equal_values_changes_nothing() -> None:
    results, again = with_scores(0.5, 0.4), with_scores(0.5, 0.4)
    again.append({"train": {"loss": 1.0}, "val": {"loss": 0.4}}, 1)
    assert again.state_dict() == results.state_dict() and again.best_index == results.best_index
