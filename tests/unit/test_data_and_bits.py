"""Data that is not what it said, and bits that are not what they were: each is met, and said in one message."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, TensorDataset

from danling_core.data.facts import facts_of
from danling_core.errors import CheckpointError, ConfigError, DataError
from danling_core.metrics import Accuracy, MetricGroup
from danling_core.parallel import environment as environments
from danling_core.results.scoring import resolve_score_mode
from tests.small_runner import SmallRunner, Stream, config, events, points, weights
from tests.unit.test_resume_here import Stopped, in_peace, resumed
from tests.unit.test_right_or_refused import refused

# data that ends early


class Short(Dataset[Any]):
    """64 samples, of which the 17th raises StopIteration."""

    def __init__(self, count: int = 64, good: int = 16) -> None:
        self.inputs, self.targets = points(count)
        self.good = good

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        if index >= self.good:
            raise StopIteration
        return self.inputs[index], self.targets[index]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_that_ends_before_its_length_is_an_error(tmp_path: Path, split: str, own: bool) -> None:
    runner = SmallRunner(config(tmp_path, dataloader={} if own else {"batch_size": 4}))
    if own:
        runner.dataloaders[split] = DataLoader(Short(), batch_size=4)
        runner.datasets.pop(split)
    else:
        runner.datasets[split] = Short()
    with pytest.raises(DataError, match=r"of 16 batches.*raised StopIteration"):
        runner.train()


# weights by what the sampler knows


class TimeFirst(SmallRunner):
    """Batches whose first dimension is time."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.collate_fn = lambda samples: (
            torch.stack([s[0] for s in samples], 1),
            torch.stack([s[1] for s in samples]),
        )
        self.metrics = None

    def evaluate_step(self, data: Any) -> Any:
        pred = self.model(data[0].T)
        return pred, self.criterion(pred, data[1])

    train_step = None  # type: ignore[assignment]


def test_an_evaluation_is_weighted_by_samples_whatever_comes_first(tmp_path: Path) -> None:
    runner = TimeFirst(config(tmp_path))
    inputs, targets = points(27)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(runner.model(inputs[20:]), targets[20:]).item()
    assert runner.evaluate("val")["val"]["loss"] == pytest.approx(expected, rel=1e-6)  # 7 samples: 5, then 2
    own = TimeFirst(config(tmp_path / "own", dataloader={}))
    own.dataloaders["val"] = DataLoader(own.datasets.pop("val"), batch_size=5, collate_fn=own.collate_fn)
    with pytest.raises(ConfigError, match=r"first dimensions \[2, 5\]: set self.size_of"):
        own.evaluate("val")
    own.size_of = lambda batch: len(batch[1])
    assert own.evaluate("val")["val"]["loss"] == pytest.approx(expected, rel=1e-6)


# silent choices in a step


def test_a_third_element_is_not_dropped(tmp_path: Path) -> None:
    inputs, targets = points(20)
    runner = SmallRunner(config(tmp_path))
    runner.datasets["train"] = TensorDataset(inputs, torch.full((20,), 2), targets)
    with pytest.raises(ConfigError, match="a batch is a list of 3: .*override train_step"):
        runner.train()
    assert runner.steps == 0


def test_a_plateau_that_takes_better_for_worse_is_refused(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, score_name="accuracy"))
    runner.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(runner.optimizer)
    refused(runner, "mode='min', and the score's better is 'max'")


def test_the_unit_of_a_schedule_made_by_hand_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("danling").addHandler(caplog.handler)
    runner = SmallRunner(config(tmp_path))
    runner.scheduler = torch.optim.lr_scheduler.StepLR(runner.optimizer, 1)
    runner.train()
    logging.getLogger("danling").removeHandler(caplog.handler)
    assert "self.scheduler, a StepLR, steps once per epoch; self.scheduler_interval = 'step'" in caplog.text


# metrics


@pytest.mark.parametrize(
    "name",
    [
        "neg_log_lik",
        "neg_accuracy",
        "negative_f1",
        "accuracy_gap",
        "loss_std",
        "recall_loss",
        "delta_auc",
        "x",
    ],
)
def test_a_direction_that_is_not_known_is_asked_for(name: str) -> None:
    with pytest.raises(ConfigError, match="set score_mode to 'min' or 'max'"):
        resolve_score_mode(name)
    assert resolve_score_mode("error_rate") == resolve_score_mode("negative_log_likelihood") == "min"


def test_a_metric_called_loss_is_refused(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.metrics = MetricGroup(loss=Accuracy())
    refused(runner, "a metric called 'loss'")


def test_an_accuracy_does_not_guess_which_dimension_has_the_classes() -> None:
    pred = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])
    target = torch.tensor([[1, 0]])
    with pytest.raises(ConfigError, match=r"Accuracy\(class_dim=1\) or Accuracy\(class_dim=-1\)"):
        Accuracy().update(pred, target)
    for dim, expected in ((1, float((pred.argmax(1) == target).float().mean())), (-1, 1.0)):
        accuracy = Accuracy(class_dim=dim)
        accuracy.update(pred, target)
        assert accuracy.compute() == expected


def test_a_metric_that_cannot_be_copied_trains(tmp_path: Path) -> None:
    class Locked(Accuracy):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot be copied")

    runner = SmallRunner(config(tmp_path, params={"samples": 21}))
    runner.metrics = MetricGroup(accuracy=Locked())
    assert runner.train()[1]["val"]["accuracy"] > 0


# generators of the user's own data


class Noisy(Dataset[Any]):
    """Adds noise from generators of its own, one in a transform."""

    class Jitter:
        def __init__(self) -> None:
            self.rng = np.random.default_rng(3)

        def __call__(self, value: torch.Tensor) -> torch.Tensor:
            return value + 0.1 * float(self.rng.standard_normal())

    def __init__(self) -> None:
        self.inputs, self.targets = points(20)
        self.generator = torch.Generator().manual_seed(9)
        self.python = random.Random(4)
        self.transform = self.Jitter()
        self.drawn: list[float] = []

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        noise = float(torch.randn((), generator=self.generator)) + self.python.random()
        return self.transform(self.inputs[index] + 0.1 * noise), self.targets[index], noise


class Augmented(Stopped):
    own_loader = False

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.datasets["train"] = Noisy()
        self.noises: list[float] = []
        if self.own_loader:
            data, generator = self.datasets.pop("train"), torch.Generator().manual_seed(2)
            self.dataloaders["train"] = DataLoader(data, 5, sampler=RandomSampler(data, generator=generator))

    def train_step(self, data: Any) -> Any:
        self.noises += data[2].tolist()
        return super().train_step(data[:2])


class OwnLoader(Augmented):
    own_loader = True


@pytest.mark.parametrize("kind", [Augmented, OwnLoader])
@pytest.mark.parametrize("where", [("train", 4), ("train", 6)])
def test_generators_of_the_data_survive_a_resume(tmp_path: Path, kind: type[Augmented], where: Any) -> None:
    loader = {"val": {"batch_size": 5}} if kind is OwnLoader else {"batch_size": 5}
    fields: dict[str, Any] = {"epoch_end": 3, "dataloader": loader}
    peace, again = in_peace(tmp_path, kind, **fields), resumed(tmp_path, where, kind, **fields)
    assert len(set(peace.noises)) == 60, "no epoch repeats another's"
    assert again.noises == peace.noises[-len(again.noises) :]
    assert weights(again) == weights(peace) and again.results == peace.results and again.bitwise


# a false "bitwise"


def _resume(root: Path, where: tuple[str, int] = ("train", 6), **changes: Any) -> Stopped:
    first = Stopped(config(root, epoch_end=3))
    first.stop_in = where
    with pytest.raises(Exception, match="asked"):
        first.train()
    second = Stopped(config(root, epoch_end=3))
    for name, value in changes.items():
        second.datasets[name] = value
        if value is None:
            del second.datasets[name]
    second.train()
    return second


def _status(runner: Stopped) -> Any:
    from danling_core.runs.folder import RunFolder

    return RunFolder(runner.dir).read_status()


def test_a_resume_in_the_same_environment_is_bitwise(tmp_path: Path) -> None:
    again = _resume(tmp_path)
    assert again.bitwise and _status(again).bitwise and _status(again).not_bitwise is None


def test_a_resume_in_another_environment_says_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = environments.environment(torch.device("cpu"))
    threads = torch.get_num_threads()
    first = Stopped(config(tmp_path, epoch_end=3))
    first.stop_in = ("train", 6)
    with pytest.raises(Exception, match="asked"):
        first.train()
    torch.set_num_threads(threads + 1)
    try:
        again = Stopped(config(tmp_path, epoch_end=3))
        again.train()
    finally:
        torch.set_num_threads(threads)
    assert not again.bitwise
    assert _status(again).not_bitwise == f"CPU threads was {threads} and is {threads + 1}"
    changed = {**before, "torch": "2.8.0", "CPU capability": "DEFAULT"}
    assert environments.what_differs(changed, before) == [
        f"torch was 2.8.0 and is {torch.__version__}",
        f"CPU capability was DEFAULT and is {before['CPU capability']}",
    ]


def test_the_event_of_a_start_holds_the_environment(tmp_path: Path) -> None:
    def started(name: str) -> dict[str, str]:
        runner = SmallRunner(config(tmp_path / name, epoch_end=1))
        runner.train()
        [event] = events(runner, "run_started")
        found: dict[str, str] = event["environment"]
        return found

    known = {
        "torch": torch.__version__,
        "NumPy": np.__version__,
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "CPU threads": str(torch.get_num_threads()),
        "deterministic algorithms": "False",
        "float32 matmul precision": "highest",
    }
    assert started("plain").items() >= known.items()
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high")
    try:
        flags = {"deterministic algorithms": "True", "float32 matmul precision": "high"}
        assert started("flags").items() >= (known | flags).items()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")


def test_data_that_changed_is_named(tmp_path: Path) -> None:
    inputs, targets = points(20)
    longer = _resume(tmp_path / "longer", train=TensorDataset(*points(40)))
    assert _status(longer).not_bitwise == "the data has changed: split 'train': the length was 20 and is 40"
    others = _resume(tmp_path / "others", train=TensorDataset(inputs + 1, targets))
    assert _status(others).not_bitwise == "the data has changed: split 'train': the samples are not the same"


def test_half_of_the_data_is_said_where_the_pass_still_has_the_position(tmp_path: Path) -> None:
    half = _resume(tmp_path, ("train", 4), train=TensorDataset(*points(10)))
    assert _status(half).not_bitwise == "the data has changed: split 'train': the length was 20 and is 10"
    assert (half.steps, half.epochs) == (8, 3), "4 and 2 steps, one more of that pass, and 2 of the last"


def test_half_of_the_data_is_refused_inside_its_other_half_and_costs_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"after 4 batches of a pass, and the data has 2 now"):
        _resume(tmp_path, train=TensorDataset(*points(10)))
    again, peace = Stopped(config(tmp_path, epoch_end=3)), in_peace(tmp_path, epoch_end=3)
    again.train()
    assert again.bitwise and weights(again) == weights(peace) and again.results == peace.results


@pytest.mark.parametrize("kind", ["Subset", "list", "Stream"])
def test_data_of_another_type_is_named_though_its_samples_are_the_same(tmp_path: Path, kind: str) -> None:
    inputs, targets = points(27)[0][:20], points(27)[1][:20]
    plain = TensorDataset(inputs, targets)
    others = {
        "Subset": Subset(plain, list(range(20))),
        "list": list(zip(inputs, targets, strict=True)),
        "Stream": Stream(inputs, targets),
    }
    again = _resume(tmp_path, train=others[kind])
    expected = f"the data has changed: split 'train': the type was TensorDataset and is {kind}"
    assert _status(again).not_bitwise == expected and again.steps == 12


def test_a_split_that_is_gone_is_named(tmp_path: Path) -> None:
    again = _resume(tmp_path / "val", val=None)
    assert _status(again).not_bitwise == "the data has changed: split 'val' is gone"
    assert set(again.results[2]) == {"train"} and again.steps == 12
    renamed = _resume(tmp_path / "train", train=None, training=TensorDataset(*points(20)))
    assert _status(renamed).not_bitwise == "the data has changed: split 'train' is gone"
    with pytest.raises(ConfigError, match=r"no split to train on: the runner has \['val'\]"):
        _resume(tmp_path / "none", train=None)


def test_a_position_that_no_longer_exists_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"after \d batches of a pass, and the data has 1 now"):
        _resume(tmp_path, train=TensorDataset(*points(5)))


def test_looking_at_samples_changes_nothing() -> None:
    data = Noisy()

    def states() -> Any:
        return (
            data.generator.get_state().tolist(),
            data.transform.rng.bit_generator.state,
            data.python.getstate(),
        )

    before, torch_before = states(), torch.get_rng_state()
    first = facts_of(data)
    assert first["length"] == 20 and first == facts_of(Noisy())
    assert states() == before and torch.equal(torch.get_rng_state(), torch_before)
