"""Values that a step logs: reduced over the split, reported beside the loss, drawn over the steps, saved inside."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import danling_core as dl
from danling_core.train.logged import LoggedValues, merged, values_of
from tests.small_runner import SmallRunner, config, events


class Logging(SmallRunner):
    """Logs in both kinds of step."""

    def train_step(self, data: Any) -> Any:
        pred, loss = super().train_step(data)
        self.log("step", self.steps)
        self.log("half", loss / 2)
        self.log("rows", len(data[0]), reduction="sum")
        self.log("least", pred, reduction="min")
        self.log("final", float(loss.detach()), reduction="last")
        return pred, loss

    def evaluate_step(self, data: Any) -> Any:
        pred, loss = super().evaluate_step(data)
        self.log("twice", loss * 2)
        self.log("by_first", data[1][0], weight=data[1].sum())
        self.meters.update(positive=data[1].float().mean())
        return pred, loss


def test_logged_values_are_reported_beside_the_loss(tmp_path: Path) -> None:
    runner = Logging(config(tmp_path, epoch_end=1, params={"samples": 22}))
    runner.train()
    [result] = runner.results.values()
    train, val = result["train"], result["val"]
    assert train["rows"] == 22
    assert train["half"] == pytest.approx(train["loss"] / 2)
    assert train["final"] == pytest.approx(runner.step_losses[-1])
    assert train["step"] == pytest.approx((5 * (1 + 2 + 3 + 4) + 2 * 5) / 22), (
        "the last batch has two samples"
    )
    assert val["twice"] == pytest.approx(2 * val["loss"])
    targets = torch.stack([target for _, target in runner.datasets["val"]])
    assert val["positive"] == pytest.approx(float(targets.float().mean()))
    first, second = targets[:5], targets[5:]
    weighted = first[0] * first.sum() + second[0] * second.sum()
    assert val["by_first"] == pytest.approx(float(weighted / targets.sum()))


@pytest.mark.parametrize("reduction", ["mean", "sum", "min", "max", "last"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_reductions(reduction: Any, as_tensor: bool) -> None:
    logged = LoggedValues()
    for value, weight in ((3.0, 2), (-1.0, 1), (2.0, 0), (5.0, 1)):
        logged.add("x", torch.tensor(value) if as_tensor else value, weight, reduction)
    wanted = {"mean": (6 - 1 + 5) / 4, "sum": 7.0, "min": -1.0, "max": 5.0, "last": 5.0}[reduction]
    assert logged.values() == {"x": wanted}
    assert logged.latest() == {"x": 5.0}
    other = LoggedValues()
    other.load_state_dict(logged.state_dict())
    assert other.values() == logged.values()


def test_values_of_several_ranks_are_joined() -> None:
    first, second = LoggedValues(), LoggedValues()
    for value in (1.0, 2.0):
        for name in ("mean", "sum", "min", "max", "last"):
            first.add(name, value, 3, name)  # type: ignore[arg-type]
    for name in ("mean", "sum", "min", "max", "last"):
        second.add(name, 10.0, 6, name)  # type: ignore[arg-type]
    second.add("alone", 4.0, 1, "mean")
    joined = merged([first.state_dict(), second.state_dict(), {}])
    assert values_of(joined) == {
        "mean": (3 * 1 + 3 * 2 + 6 * 10) / 12,
        "sum": 13.0,
        "min": 1.0,
        "max": 10.0,
        "last": (2 * 3 + 10 * 6) / 9,
        "alone": 4.0,
    }
    third = LoggedValues()
    third.add("sum", 1.0, 1, "mean")
    with pytest.raises(dl.ConfigError, match="different reductions on different ranks: mean, sum"):
        merged([first.state_dict(), third.state_dict()])


def test_a_value_that_is_not_a_number_is_seen() -> None:
    logged = LoggedValues()
    for value in (1.0, math.nan, 2.0):
        for name in ("mean", "min", "max"):
            logged.add(name, value, 1, name)  # type: ignore[arg-type]
    assert all(math.isnan(value) for value in logged.values().values())


@pytest.mark.parametrize("value", [2, True, numpy.float32(0.5), numpy.array([0.25]), torch.tensor([[1.5]])])
def test_any_number_can_be_logged(value: Any) -> None:
    logged = LoggedValues()
    logged.add("x", value, 1, "mean")
    assert logged.values() == {"x": value.item() if hasattr(value, "item") else value}


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (None, {}, r"self.log\('x'\) was given a NoneType, wanted a number or a tensor"),
        ("0.5x", {}, "was given a str, wanted a number"),
        (torch.zeros(0), {}, r"a tensor of shape \(0,\)"),
        (torch.zeros(1, dtype=torch.complex64), {}, "was given a complex, wanted a number"),
        (torch.zeros(2), {"reduction": "last"}, "one of them where reduction='last'"),
        (1.0, {"reduction": "median"}, "reduction is 'median', wanted one of mean, sum, min, max, last"),
    ],
)
def test_what_cannot_be_logged_is_refused_before_the_first_step(
    value: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    class Refused(SmallRunner):
        def train_step(self, data: Any) -> Any:
            self.log("x", value, **options)
            return super().train_step(data)

    runner = Refused(config(tmp_path, sanity_batches=1))
    with pytest.raises(dl.ConfigError, match=message):
        runner.train()
    assert runner.steps == 0


@pytest.mark.parametrize("name", ["loss", "accuracy"])
@pytest.mark.parametrize("step", ["train_step", "evaluate_step"])
def test_a_name_that_means_two_values_is_refused(name: str, step: str, tmp_path: Path) -> None:
    class Twice(SmallRunner):
        def train_step(self, data: Any) -> Any:
            if step == "train_step":
                self.log(name, 1.0)
            return super().train_step(data)

        def evaluate_step(self, data: Any) -> Any:
            if step == "evaluate_step":
                self.log(name, 1.0)
            return super().evaluate_step(data)

    with pytest.raises(dl.ConfigError, match=f"two values are called '{name}'"):
        runner = Twice(config(tmp_path, sanity_batches=1))
        runner.train()
    assert runner.steps == 0, "before the first step"


def test_a_name_has_one_reduction(tmp_path: Path) -> None:
    class Two(SmallRunner):
        def train_step(self, data: Any) -> Any:
            self.log("x", 1.0)
            self.log("x", 1.0, reduction="sum")
            return super().train_step(data)

    with pytest.raises(dl.ConfigError, match="has reduction='sum' here, and 'mean' before in the same split"):
        Two(config(tmp_path)).train()


def test_a_logged_value_is_the_score(tmp_path: Path) -> None:
    class Scored(SmallRunner):
        def evaluate_step(self, data: Any) -> Any:
            self.log("quality", -float((self.epochs - 1) ** 2))
            return super().evaluate_step(data)

    runner = Scored(config(tmp_path, epoch_end=3, score_name="quality", score_mode="max", sanity_batches=1))
    runner.train()
    assert runner.scores == {0: -1.0, 1: 0.0, 2: -1.0} and runner.best_index == 1


def test_log_is_also_the_setting(tmp_path: Path) -> None:
    off, on = SmallRunner(config(tmp_path, log=False)), SmallRunner(config(tmp_path))
    assert not off.log and on.log and on.log == True and off.log == False  # noqa: E712
    with pytest.raises(AttributeError, match="follows from the config"):
        on.log = False
    assert "weighted `mean`" in (on.log.__doc__ or "") or "mean" in (type(on).log.__doc__ or "")


def test_inference_and_a_notebook_may_log(tmp_path: Path) -> None:
    class Loose(SmallRunner):
        def infer_step(self, data: Any) -> Any:
            self.log("ignored", 1.0)
            return super().infer_step(data)

    runner = Loose(config(tmp_path))
    assert len(runner.infer("val")) == 7
    batch = next(iter(torch.utils.data.DataLoader(runner.datasets["train"], batch_size=4)))
    runner.log("before", 2.0)
    runner.train_step(batch)
    assert runner.get_step_result()["before"] == 2.0


# over the steps ---------------------------------------------------------------------------------------------
def test_curves_over_the_steps(tmp_path: Path) -> None:
    runner = Logging(
        config(
            tmp_path,
            tensorboard=True,
            log_interval=2,
            clip_grad_norm=1.0,
            epoch_end=2,
            optim={"name": "sgd", "lr": 0.1, "groups": [{"match": "bias", "lr": 0.2}]},
        )
    )
    runner.tokens_per_sample, runner.flops_per_sample = 8, 1e6
    runner.train()
    reported = events(runner, "progress")
    assert [event["step"] for event in reported] == [2, 4, 6, 8]
    curves = reported[1]["curves"]
    assert curves["loss"] == pytest.approx(runner.step_losses[3]) and curves["half"] == curves["loss"] / 2
    assert (curves["lr/0"], curves["lr/1"]) == (0.2, 0.1) or (curves["lr/0"], curves["lr/1"]) == (0.1, 0.2)
    assert curves["grad_norm"] == pytest.approx(math.hypot(*runner.gradients[3]), rel=1e-5)
    assert curves["tokens_per_second"] == pytest.approx(8 * curves["samples_per_second"])
    assert curves["teraflops_per_second"] == pytest.approx(curves["samples_per_second"] * 1e-6)
    assert 0 <= curves["data_wait_share"] <= 1 and curves["memory_peak_bytes"] > 1e6
    assert "flops_utilisation" not in curves, "no peak is known of a CPU"
    drawn = EventAccumulator(f"{runner.dir}/tensorboard/steps").Reload()
    points = [(point.step, point.value) for point in drawn.Scalars("train_steps/loss")]
    assert points == [(each["step"], pytest.approx(each["curves"]["loss"])) for each in reported]
    over_epochs = EventAccumulator(f"{runner.dir}/tensorboard").Reload()
    assert [point.step for point in over_epochs.Scalars("train/half")] == [0, 1]


def test_a_resume_drops_later_points_of_a_curve_and_no_others(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "tensorboard": True,
        "log_interval": 1,
        "save_interval_steps": 3,
        "epoch_end": 3,
    }

    class Stopping(SmallRunner):
        stops_at: int | None = 4

        def after_step(self) -> None:
            if self.steps == self.stops_at:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stopping(config(tmp_path, **fields)).train()
    Stopping.stops_at = None
    runner = Stopping(config(tmp_path, **fields))
    runner.train()
    assert runner.resumed is not None and runner.resumed["step"] in (3, 4)
    drawn = EventAccumulator(f"{runner.dir}/tensorboard/steps").Reload()
    assert [point.step for point in drawn.Scalars("train_steps/lr")] == list(range(1, 13))


def test_no_reports_inside_an_epoch(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, log_interval=None))
    runner.train()
    assert runner.log_interval is None and not events(runner, "progress") and len(runner.results) == 2


def test_two_optimizers_have_their_own_curves(tmp_path: Path) -> None:
    class Two(SmallRunner):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.other = torch.nn.Linear(2, 2)
            self.other_optimizer = torch.optim.SGD(self.other.parameters(), lr=0.5)

        def backward(self, loss: torch.Tensor) -> None:
            loss.backward()

        def train_step(self, data: Any) -> Any:
            returned = super().train_step(data)  # which steps its own
            self.advance(self.other(data[0]).pow(2).mean(), self.other_optimizer)
            return returned

    runner = Two(config(tmp_path, log_interval=4, clip_grad_norm=0.5, epoch_end=1))
    runner.train()
    [report] = events(runner, "progress")
    assert (report["curves"]["lr"], report["curves"]["lr_other_optimizer"]) == (0.1, 0.5)
    assert report["curves"]["grad_norm_other_optimizer"] > 0
