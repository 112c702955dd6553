"""No wrong result with exit code 0: what cannot be right is refused before the first step, in one message."""

from __future__ import annotations

import logging
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import danling_core as dl
from danling_core.config import FreeParams
from danling_core.config.sections import unread
from danling_core.errors import ConfigError, NonFiniteLossError, RunInterrupted
from danling_core.metrics import Accuracy, MetricGroup
from danling_core.runs.finding import resolve
from danling_core.runs.folder import RunFolder
from tests.small_runner import SmallRunner, config, events, points, weights
from tests.unit.test_resume_here import Stopped, in_peace, resumed


def refused(runner: SmallRunner, message: str) -> None:
    """Train, which is refused before the first step, by every way in."""
    for start in (runner.train, runner.run):
        with pytest.raises(ConfigError, match=message):
            start()
        assert runner.steps == 0


# keys without effect


def test_an_optimizer_in_the_config_and_in_the_runner_is_refused(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, optim={"name": "sgd", "lr": 0.1}))
    runner.optimizer = torch.optim.SGD(runner.model.parameters(), lr=0.1)
    refused(runner, "section 'optim', and the runner sets self.optimizer")


def test_a_schedule_in_the_config_and_in_the_runner_is_refused(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, scheduler={"name": "cosine"}))
    runner.scheduler = torch.optim.lr_scheduler.ConstantLR(runner.optimizer)
    refused(runner, "section 'scheduler', and the runner sets self.scheduler")


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (
            {"batch_size": 5},
            "dataloader.batch_size has no effect, since the runner makes the loaders of all splits",
        ),
        ({"val": {"batch_size": 3}}, "dataloader.val has no effect: the runner makes the loader of 'val'"),
    ],
)
def test_loader_keys_for_loaders_of_the_users_own_are_refused(
    tmp_path: Path, loader: dict[str, Any], message: str
) -> None:
    runner = SmallRunner(config(tmp_path, dataloader=loader))
    runner.dataloaders = {name: DataLoader(runner.datasets[name], batch_size=4) for name in ("train", "val")}
    refused(runner, message)


class Free(dl.TorchRunner):
    """With untyped params."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        inputs, targets = points(20)
        self.datasets["train"] = self.datasets["val"] = TensorDataset(inputs, targets)
        self.model = nn.Linear(2, 2)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.params.lr)


@pytest.mark.parametrize("sanity_batches", [0, 2])
def test_a_param_that_nobody_read_is_named_with_the_nearest_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sanity_batches: int
) -> None:
    logging.getLogger("danling").addHandler(caplog.handler)
    params = {"lr": 0.1, "lrr": 0.2, "shuffle": "no"}
    runner = Free(config(tmp_path, params=params, sanity_batches=sanity_batches))
    runner.train()
    logging.getLogger("danling").removeHandler(caplog.handler)
    assert "params.lrr was not read by the first step, so it has no effect; did you mean 'lr'" in caplog.text
    assert "params.shuffle is the text 'no', which is true" in caplog.text
    assert "params.lr was" not in caplog.text


def test_params_remember_what_was_read() -> None:
    params = FreeParams({"a": 1, "b": {"c": 2, "d": 3}, "items": 4, "_read": 5, "e": 6})
    assert params.a == 1 and params["b"].c == 2 and params.items == 4 and "e" in params
    assert unread(params) == ["b.d", "_read"]
    assert dict(params.b) == {"c": 2, "d": 3} and params._read == 5
    assert unread(params) == []


# nothing trained, nothing counted


def test_a_runner_without_a_train_split_is_refused(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, step_end=3))
    runner.datasets = {"fit": runner.datasets["train"], "val": runner.datasets["val"]}
    refused(runner, r"no split to train on: the runner has \['fit', 'val'\]")
    runner.train("fit")
    assert runner.steps == 3


def test_an_empty_list_of_splits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no split to train on"):
        SmallRunner(config(tmp_path)).train([])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patience": 2}, "patience is 2, and no split is evaluated"),
        ({"evaluate_every": 2}, "evaluate_every has no"),
    ],
)
def test_keys_about_evaluation_need_one(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    runner = SmallRunner(config(tmp_path, **fields))
    del runner.datasets["val"]
    refused(runner, message)


def test_a_metric_that_counts_nothing_is_no_score(tmp_path: Path) -> None:
    class Forgets(SmallRunner):
        def evaluate_step(self, data: Any) -> Any:
            return self.model(data[0]), None

    with pytest.raises(ConfigError, match="metric 'accuracy' has counted nothing: call self.update_metrics"):
        Forgets(config(tmp_path, score_name="accuracy")).train()


def test_an_evaluation_that_reports_nothing_is_refused(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.evaluate_step = lambda data: (None, None)  # type: ignore[method-assign]
    runner.metrics = None
    with pytest.raises(ConfigError, match="split 'val' reports nothing"):
        runner.train()


# the folder before train


def test_a_file_written_before_training_makes_no_run_of_its_own(tmp_path: Path) -> None:
    class Notes(SmallRunner):
        def __init__(self, given: Any) -> None:
            super().__init__(given)
            Path(self.dir).mkdir(parents=True, exist_ok=True)
            Path(self.dir, "notes.txt").write_text("mine")
            self.yaml(f"{self.dir}/config.yaml")
            self.seen = (self.dir, self.timestamp, self.checkpoint_dir, self.log_path)

        def after_step(self) -> None:
            if self.steps == 6 and not self.resumed:
                raise KeyboardInterrupt

    first = Notes(config(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert first.seen == (first.dir, first.timestamp, first.checkpoint_dir, first.log_path)
    again = Notes(config(tmp_path))
    assert again.seen == first.seen
    again.train()
    assert again.resumed is not None and again.seen[0] == again.dir
    later = Notes(config(tmp_path))
    assert later.seen == first.seen and later.train() == again.results
    assert len(list(Path(first.dir).parent.glob("2*"))) == 1


# methods by themselves


def test_a_loop_of_ones_own_needs_no_run(tmp_path: Path) -> None:
    whole = SmallRunner(config(tmp_path / "whole"))
    results = whole.train()
    runner = SmallRunner(config(tmp_path / "own"))
    assert runner.evaluate_epoch("val") == SmallRunner(config(tmp_path / "third")).evaluate("val")["val"]
    for epoch in range(2):
        result = {"train": runner.train_epoch(), "val": runner.evaluate_epoch()}
        assert result == results[epoch]
        runner.append_result(result, epoch)
    assert (runner.epochs, runner.steps, runner.results) == (2, 8, results)
    assert weights(runner) == weights(whole) and not Path(runner.dir).exists()


def test_a_step_of_ones_own(tmp_path: Path) -> None:
    runner, plain = SmallRunner(config(tmp_path)), SmallRunner(config(tmp_path))
    inputs, targets = points(5)
    for _ in range(3):
        _, loss = runner.train_step((inputs, targets))
        expected = plain.criterion(plain.model(inputs), targets)
        expected.backward()
        plain.optimizer.step()
        plain.optimizer.zero_grad()
        assert loss.item() == expected.item()
    assert weights(runner) == weights(plain) and (runner.iters, runner.steps) == (3, 3)
    assert runner.get_step_result()["accuracy"] >= 0


def test_training_goes_on_by_hand_once_train_has_ended(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"params": {"width": 4, "dropout": 0.5}}
    longer = SmallRunner(config(tmp_path / "longer", epoch_end=3, **fields))
    longer.train()
    runner = SmallRunner(config(tmp_path / "run", **fields))
    runner.train()
    written = events(runner)
    assert (runner.iters, runner.steps, runner.epochs) == (8, 8, 2)
    assert {"train": runner.train_epoch(), "val": runner.evaluate_epoch()} == longer.results[2]
    assert (runner.iters, runner.steps, runner.epochs) == (12, 12, 3) and weights(runner) == weights(longer)
    assert events(runner) == written and set(runner.results) == {0, 1}


@pytest.mark.parametrize("first", ["train", "train_epoch"])
def test_a_step_goes_on_once_train_has_ended(tmp_path: Path, first: str) -> None:
    runner, (inputs, targets) = SmallRunner(config(tmp_path)), points(5)
    getattr(runner, first)()
    before = runner.steps
    plain = nn.Linear(2, 2)
    plain.load_state_dict(runner.model.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for number in range(1, 4):
        _, loss = runner.train_step((inputs, targets))
        expected = nn.functional.cross_entropy(plain(inputs), targets)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert loss.item() == expected.item() and runner.steps == runner.iters == before + number
    assert torch.equal(runner.model.weight, plain.weight) and torch.equal(runner.model.bias, plain.bias)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    "call",
    [
        lambda r: r.save_checkpoint(),
        lambda r: r.save_result(),
        lambda r: r.emit("mine", value=1),
        lambda r: r.init_tensorboard(),
    ],
    ids=["save_checkpoint", "save_result", "emit", "init_tensorboard"],
)
def test_what_writes_to_a_run_says_where_it_can(tmp_path: Path, moment: str, call: Any) -> None:
    runner = SmallRunner(config(tmp_path))
    if moment == "after":
        runner.train()
        written = events(runner)
    with pytest.raises(ConfigError, match=r"writes to the run's folder.*at_work"):
        call(runner)
    if moment == "after":
        assert events(runner) == written
    else:
        with pytest.raises(ConfigError, match="no step was made yet"):
            runner.get_step_result()


def test_results_are_printed_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.append_result({"val": {"loss": 0.5}}, 0)
    runner.print_result()
    assert "0.5000" in capsys.readouterr().err


# states as mappings


@pytest.fixture
def finished(tmp_path: Path) -> SmallRunner:
    runner = SmallRunner(config(tmp_path / "finished", optim={"name": "adamw", "lr": 0.01}))
    runner.train()
    return runner


@pytest.mark.parametrize("way", ["load_checkpoint", "load_state_dict"])
def test_a_state_is_taken_up_before_training(tmp_path: Path, finished: SmallRunner, way: str) -> None:
    fields: dict[str, Any] = {"optim": {"name": "adamw", "lr": 0.01}}
    longer = SmallRunner(config(tmp_path / "longer", epoch_end=3, **fields))
    longer.train()
    runner = SmallRunner(config(tmp_path / way, epoch_end=3, **fields))
    getattr(runner, way)(finished.state_dict())
    assert (runner.steps, runner.epochs, runner.results) == (8, 2, finished.results)
    runner.train()
    assert runner.steps == 12 and runner.results == longer.results and weights(runner) == weights(longer)


class Overflows(Stopped):
    """Halves its gradient scale in the third step."""

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss * 1e38 if self.steps == 2 else loss)


def test_a_state_of_the_middle_of_an_epoch_is_taken_up_by_hand_and_is_not_bitwise(tmp_path: Path) -> None:
    def made(kind: type[Stopped], name: str) -> Stopped:
        fields: dict[str, Any] = {"precision": "fp16", "optim": {"name": "adamw", "lr": 0.01}}
        return kind(config(tmp_path / name, params={"width": 8, "dropout": 0.5}, **fields))

    def moments(runner: Stopped) -> list[torch.Tensor]:
        return [value for state in runner.optimizer.state.values() for value in state.values()]

    first = made(Overflows, "first")
    first.stop_in = ("train", 4)
    with pytest.raises(RunInterrupted):
        first.train()
    state, (second, third) = first.state_dict(), [made(Stopped, name) for name in ("second", "third")]
    kept = [value.clone() for value in moments(first)]
    for runner in (second, third):
        runner.load_state_dict(state)
        assert (runner.steps, runner.epochs) == (first.steps, 1) == (6, 1)
        assert all(map(torch.equal, moments(runner), kept))
    assert state["scalers"]["optimizer"]["scale"] == 2.0**15
    assert second.state_dict()["scalers"] == third.state_dict()["scalers"] == state["scalers"]
    second.train()
    assert (second.steps, second.epochs) == (8, 2)
    status = RunFolder(second.dir).read_status()
    assert status is not None and not status.bitwise and status.not_bitwise is not None
    assert "load_state_dict restores no random generators" in status.not_bitwise
    for runner in (first, third):
        assert all(map(torch.equal, moments(runner), kept)), (
            "nobody shares a tensor with the one that trained"
        )
    assert not any(map(torch.equal, moments(second), kept))


def test_a_runner_is_made_from_a_state(finished: SmallRunner) -> None:
    assert weights(SmallRunner.from_checkpoint(finished.state_dict())) == weights(finished)


def test_a_config_is_taken_from_a_state_or_a_mapping(tmp_path: Path, finished: SmallRunner) -> None:
    for given in (finished.state_dict(), finished.config.dict()):
        runner = SmallRunner(config(tmp_path / "else"))
        runner.load_config(given, overwrite=True)
        assert runner.config.optim == finished.config.optim


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"model": {"module": w}},
        lambda w: {"state_dict": {f"module._orig_mod.{k}": v for k, v in w.items()}},
        lambda w: {f"_orig_mod.{k}": v for k, v in w.items()},
    ],
)
def test_weights_are_found_however_they_are_wrapped(tmp_path: Path, finished: SmallRunner, wrap: Any) -> None:
    runner = SmallRunner(config(tmp_path / "else"))
    runner.load_pretrained(wrap(finished.model.state_dict()))
    assert weights(runner) == weights(finished)


def test_a_path_may_be_bytes(tmp_path: Path, finished: SmallRunner) -> None:
    runner = SmallRunner(config(tmp_path / "else"))
    runner.load_checkpoint(finished.checkpoint_dir.encode())
    assert weights(runner) == weights(finished)
    runner.json(bytes(tmp_path / "mine.json"))
    assert SmallRunner.from_json(bytes(tmp_path / "mine.json")).config == runner.config


# step mode


def test_a_sized_loader_of_the_users_own_ends_its_last_pass(tmp_path: Path) -> None:
    def runner(name: str) -> SmallRunner:
        made = SmallRunner(config(tmp_path / name, step_end=8, dataloader={}))
        made.scheduler = torch.optim.lr_scheduler.StepLR(made.optimizer, 1, gamma=0.5)
        made.scheduler_interval = "epoch"
        return made

    own, ours = runner("own"), runner("ours")
    data = own.datasets["train"]
    own.dataloaders["train"] = DataLoader(data, batch_size=5)
    ours = SmallRunner(config(tmp_path / "ours", step_end=8))
    ours.scheduler = torch.optim.lr_scheduler.StepLR(ours.optimizer, 1, gamma=0.5)
    ours.scheduler_interval = "epoch"
    for each in (own, ours):
        each.train()
        assert each.epochs == 2 and each.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 4)


# vectors


class Recall:
    """A value for each class."""

    def __init__(self) -> None:
        self.hits, self.seen = torch.zeros(2), torch.zeros(2)

    def update(self, pred: torch.Tensor, target: torch.Tensor) -> None:
        for c in range(2):
            self.seen[c] += (target == c).sum()
            self.hits[c] += ((pred.argmax(1) == c) & (target == c)).sum()

    def compute(self) -> torch.Tensor:
        return self.hits / self.seen

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]


def test_a_value_for_each_class_is_reported_by_position(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, score_name="recall/1", score_mode="max"))
    runner.metrics = MetricGroup(recall=Recall(), accuracy=Accuracy())
    result = runner.train()[1]["val"]
    inputs, targets = points(27)
    with torch.no_grad():
        pred = runner.model(inputs[20:]).argmax(1)
    expected = {str(c): float((pred[targets[20:] == c] == c).float().mean()) for c in range(2)}
    assert result["recall"] == pytest.approx(expected)
    assert runner.best_score == pytest.approx(max(r["val"]["recall"]["1"] for r in runner.results.values()))


@pytest.mark.parametrize(
    "vector", [[0.5, 0.25], (0.5, 0.25), torch.tensor([0.5, 0.25]), torch.tensor([0.5, 0.25]).numpy()]
)
def test_a_vector_is_the_same_wherever_it_is_reported(tmp_path: Path, vector: Any) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.append_result({"val": {"loss": 1.0, "recall": vector}}, 0)
    assert runner.results[0]["val"]["recall"] == {"0": 0.5, "1": 0.25}
    assert "recall/0" in runner.format_result({"val": {"recall": vector}})
    assert "recall/1 0.2500" in runner.format_epoch_result({"val": {"recall": vector}})


# small words


def test_a_mode_is_one_of_three(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.mode = "evaluate"  # type: ignore[assignment]
    assert runner.mode is dl.RunnerMode.evaluate
    with pytest.raises(ConfigError, match="self.mode is 'val', wanted one of train, evaluate, infer"):
        runner.mode = "val"  # type: ignore[assignment]


def test_uuid_batch_size_and_lines_have_their_defaults(tmp_path: Path) -> None:
    runner = SmallRunner(
        config(tmp_path, epoch_end=3, dataloader={"batch_size": 5, "val": {"batch_size": 3}})
    )
    assert isinstance(runner.uuid, uuid.UUID)
    seen: dict[str, int] = {}

    class Board:
        def add_scalar(self, tag: str, value: float, step: int) -> None: ...

    def look(data: Any) -> Any:
        seen[str(runner.split)] = runner.batch_size
        return SmallRunner.evaluate_step(runner, data)

    runner.evaluate_step = look  # type: ignore[method-assign]
    runner.train()
    assert seen == {"val": 3} and runner.batch_size == 5
    assert runner.format_epoch_result({"val": {"loss": 0.5}}) == "epoch 3/3 | val loss 0.5000"


class Late(Stopped):
    """Hands its second layer to the optimizer in the second epoch; until then that layer only collects gradients."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        self.optimizer = torch.optim.SGD(self.model[0].parameters(), lr=0.1)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def train_epoch(self, split: str = "train") -> Any:
        if self.epochs == 1 and len(self.optimizer.param_groups) == 1:
            self.optimizer.add_param_group({"params": list(self.model[1].parameters()), "lr": 0.1})
        return super().train_epoch(split)


def test_a_layer_that_is_trained_later_begins_with_the_gradient_of_its_first_step(tmp_path: Path) -> None:
    undisturbed = in_peace(tmp_path, Late)
    again = resumed(tmp_path, ("train", 1), Late)
    assert again.bitwise and weights(again) == weights(undisturbed)


def test_a_step_after_an_evaluation_is_checked_as_before_it(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.train()
    runner.evaluate_epoch("val")
    inputs, targets = points(5)
    with pytest.raises(NonFiniteLossError):
        runner.train_step((inputs * float("nan"), targets))


class Loss(Accuracy):
    """A metric whose class is called as the criterion's value is."""


def test_a_metric_of_training_alone_that_is_called_loss_is_refused_before_the_first_step(
    tmp_path: Path,
) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.train_metrics = Loss()
    with pytest.raises(ConfigError, match="called 'loss'"):
        runner.train()
    assert runner.steps == 0


def test_a_newer_folder_of_somebody_elses_is_not_the_run_that_is_named(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.train()
    ghost = Path(runner.dir).parent / "20990101-000000-000000"
    ghost.mkdir()
    (ghost / "notes.txt").write_text("mine")
    assert resolve(str(tmp_path), runner.id).url == runner.dir
    assert resolve(str(tmp_path), str(ghost.parent)).url == runner.dir


def test_the_end_by_patience_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("danling").addHandler(caplog.handler)
    fields: dict[str, Any] = {"optim": {"name": "sgd", "lr": 0.0}, "patience": 2, "epoch_end": 9}
    runner = SmallRunner(config(tmp_path, **fields))
    runner.train()
    logging.getLogger("danling").removeHandler(caplog.handler)
    assert (
        runner.epochs == 3
        and "training ends here: no better loss for 2 evaluations (patience)" in caplog.text
    )


def test_a_runner_that_was_not_made_and_data_that_is_no_mapping_are_refused(tmp_path: Path) -> None:
    class Unmade(SmallRunner):
        def __init__(self, given: Any) -> None: ...

    for call in ("train", "run"):
        with pytest.raises(ConfigError, match=r"Unmade.__init__ does not call super\(\).__init__\(config\)"):
            getattr(Unmade(config(tmp_path)), call)()
    with pytest.raises(ConfigError, match=r"self.datasets is a list, wanted a mapping by split"):
        SmallRunner(config(tmp_path)).datasets = [1]  # type: ignore[assignment]


def test_a_score_that_is_misspelt_is_answered_with_the_near_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'accuracy'"):
        SmallRunner(config(tmp_path, score_name="acuracy"))
