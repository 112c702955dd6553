"""Metrics: device-side counts, weighted means, one reduction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from danling_core.errors import ConfigError
from danling_core.metrics import (
    Accuracy,
    Additive,
    MeanMeter,
    Metric,
    MetricGroup,
)
from danling_core.metrics.group import joined_state, load_joined_state

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_the_mean_is_weighted_by_samples_in_float64(device: str) -> None:
    meter = MeanMeter()
    losses = torch.rand(100, device=device)
    sizes = torch.randint(1, 65, (100,))
    for loss, size in zip(losses, sizes.tolist(), strict=True):
        meter.update(loss, size)
    expected = (losses.cpu().double() * sizes).sum() / sizes.sum()
    assert meter.compute() == pytest.approx(expected.item(), rel=1e-14)
    assert meter.state().dtype is torch.float64 and meter.state().device.type == device
    meter.reset()
    assert math.isnan(meter.compute())


def test_small_values_are_not_lost_in_a_long_sum() -> None:
    meter = MeanMeter()
    meter.update(1e8, 1)
    for _ in range(1000):
        meter.update(torch.tensor(0.1), 1)
    assert meter.compute() == pytest.approx((1e8 + 1000 * torch.tensor(0.1).item()) / 1001, rel=1e-12)


@pytest.mark.parametrize("weight", [0, 0.0, torch.tensor(0), torch.tensor(0.0)])
def test_a_weight_of_zero_counts_nothing_even_with_nan(weight: Any) -> None:
    meter = MeanMeter()
    meter.update(torch.tensor(2.0), 3)
    meter.update(torch.tensor(math.nan), weight)
    meter.update(torch.tensor([5.0]), torch.tensor(1))
    assert meter.compute() == pytest.approx(11 / 4)


def test_updates_keep_no_graph_and_take_no_vector() -> None:
    meter = MeanMeter()
    meter.update(torch.tensor(2.0, requires_grad=True), 3)
    assert not meter.state().requires_grad
    with pytest.raises(ConfigError, match="shape"):
        meter.update(torch.ones(3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("pred", "target", "expected"),
    [
        ([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]], [0, 1, 1], 2 / 3),
        ([0.3, -0.2, 1.0, -1.0], [1, 1, 1, 0], 3 / 4),
        ([[0.3], [-0.2]], [1, 1], 1 / 2),
        ([[1.0, -1.0], [-1.0, 1.0]], [[1, 1], [0, 1]], 3 / 4),
        ([1, 2, 3], [1, 2, 4], 2 / 3),
    ],
)
def test_accuracy_of_classes_binary_labels_and_indices(
    pred: list[Any], target: list[Any], expected: float, device: str
) -> None:
    metric = Accuracy()
    metric.update(torch.tensor(pred, device=device), torch.tensor(target, device=device))
    assert metric.compute() == pytest.approx(expected)


def test_accuracy_takes_probabilities_segments_sequences_and_ignored_targets() -> None:
    metric = Accuracy(threshold=0.5)
    metric.update(torch.tensor([0.4, 0.6]), torch.tensor([0, 1]))
    assert metric.compute() == 1.0
    logits, target = torch.randn(4, 7, 5), torch.randint(7, (4, 5))
    first, last = Accuracy(), Accuracy()
    first.update(logits, target)
    last.update(logits.transpose(1, 2), target)
    assert (
        first.compute()
        == last.compute()
        == pytest.approx((logits.argmax(1) == target).double().mean().item())
    )
    ignoring = Accuracy(ignore_index=-100)
    ignoring.update(torch.eye(3), torch.tensor([0, -100, 0]))
    ignoring.update(torch.eye(3), torch.tensor([-100, -100, -100]))
    ignoring.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    assert ignoring.compute() == 0.5
    with pytest.raises(ConfigError, match=r"\(2, 3\).*\(5,\)"):
        metric.update(torch.zeros(2, 3), torch.zeros(5))


def test_state_stays_small_however_many_batches() -> None:
    group = MetricGroup(accuracy=Accuracy(), task={"binary": Accuracy()})
    for _ in range(50):
        group["accuracy"].update(torch.randn(8, 3), torch.randint(3, (8,)))
        group["task"].update(torch.randn(8), torch.randint(2, (8,)))
    assert group.state().shape == (4,)


def test_all_metrics_of_a_split_are_reduced_by_one_collective_to_the_exact_value() -> None:
    torch.manual_seed(0)
    pred, target = torch.randn(7, 3), torch.randint(3, (7,))
    ranks = []
    for part in (slice(0, 4), slice(4, 7), slice(7, 7)):
        loss, group = MeanMeter(), MetricGroup({"accuracy": Accuracy(), "again": Accuracy()})
        if len(target[part]):
            loss.update(torch.nn.functional.cross_entropy(pred[part], target[part]), len(target[part]))
            group.update(pred[part], target[part])
        ranks.append((loss, group))
    total = torch.stack([joined_state(pair) for pair in ranks]).sum(0)
    for loss, group in ranks:
        load_joined_state([loss, group], total)
        assert loss.compute() == pytest.approx(torch.nn.functional.cross_entropy(pred, target).item())
        assert group.compute()["accuracy"] == pytest.approx((pred.argmax(1) == target).double().mean().item())


def test_multi_task_metrics_take_and_give_nested_mappings() -> None:
    group = MetricGroup({"a": {"acc": Accuracy()}, "b": {"acc": Accuracy(), "deep": {"acc": Accuracy()}}})
    ok, wrong = torch.eye(2), torch.tensor([1, 0])
    group["b"].pop("deep")
    group.update({"a": ok, "b": ok}, {"a": torch.tensor([0, 1]), "b": wrong})
    assert group.compute() == {"a": {"acc": 1.0}, "b": {"acc": 0.0}}
    group.reset()
    assert math.isnan(group.compute()["a"]["acc"])
    with pytest.raises(ConfigError, match="task 'a'"):
        group.update(ok, wrong)


def test_the_mean_over_tasks_is_a_task_of_its_own() -> None:
    tasks = {"a": {"acc": Accuracy(), "top": Accuracy()}, "b": {"acc": Accuracy()}}
    group = MetricGroup(tasks, average_tasks=True)
    group.update(
        {"a": torch.eye(2), "b": torch.eye(2)}, {"a": torch.tensor([0, 1]), "b": torch.tensor([1, 1])}
    )
    assert group.compute()["average"] == {"acc": 0.75, "top": 1.0}
    assert "average" not in MetricGroup(tasks).compute()
    with pytest.raises(ConfigError, match="average_tasks needs tasks"):
        MetricGroup(acc=Accuracy(), average_tasks=True)
    with pytest.raises(ConfigError, match="'average', which is the mean over tasks"):
        MetricGroup({"average": {"acc": Accuracy()}}, average_tasks=True)


def test_a_metric_needs_its_three_methods() -> None:
    with pytest.raises(ConfigError, match="'x' needs update"):
        MetricGroup(x=3)
    assert (
        isinstance(Accuracy(), Metric)
        and isinstance(MetricGroup(), Additive)
        and isinstance(MeanMeter(), Additive)
    )


def test_torchmetrics_objects_are_metrics_and_are_left_out_of_our_reduction() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    theirs = torchmetrics.classification.MulticlassAccuracy(num_classes=3, average="micro")
    group = MetricGroup(ours=Accuracy(), theirs=theirs).to("cpu")
    pred, target = torch.randn(20, 3), torch.randint(3, (20,))
    group.update(pred, target)
    values = group.compute()
    assert values["ours"] == pytest.approx(values["theirs"]) and type(values["theirs"]) is float
    assert group.state().shape == (2,)


def test_a_pass_continues_from_its_saved_state(tmp_path: Any) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    def make() -> MetricGroup:
        mse = torchmetrics.MeanSquaredError()
        return MetricGroup(ours=Accuracy(), theirs=mse, task={"acc": Accuracy()})

    def update(group: MetricGroup, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(9, generator=generator), torch.randint(2, (9,), generator=generator)
        group["ours"].update(x, y)
        group["theirs"].update(x, y.float())
        group["task"].update(x, y)

    whole, resumed = make(), make()
    update(whole, 0)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    update(whole, 1)
    update(resumed, 1)
    assert resumed.compute() == whole.compute()
    with pytest.raises(ConfigError, match="this run has"):
        MetricGroup(other=Accuracy()).load_state_dict(whole.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_updates_never_wait_for_the_gpu() -> None:
    meter, group = MeanMeter(), MetricGroup(accuracy=Accuracy(ignore_index=-1))
    pred, target = torch.randn(64, 3, device="cuda"), torch.randint(3, (64,), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for weight in (64, torch.tensor(64, device="cuda")):
            meter.update(pred.mean(), weight)
            group.update(pred, target)
        load_joined_state([meter, group], joined_state([meter, group]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(meter.compute())
