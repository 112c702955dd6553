"""Attributes of a runner that training changes: all of them are in every checkpoint, and a resume changes no bit."""

from __future__ import annotations

import collections
import copy
import enum
import random
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from danling_core.errors import CheckpointError, ConfigError
from tests.marks import rarely
from tests.small_runner import SmallRunner, config, weights
from tests.unit.test_resume_here import Stopped, in_peace, resumed


class Memory:
    """A queue with a state."""

    def __init__(self) -> None:
        self.items = torch.zeros(4)

    def push(self, value: torch.Tensor) -> None:
        self.items = torch.cat([value.detach().reshape(1), self.items[:-1]])

    def state_dict(self) -> dict[str, Any]:
        return {"items": self.items}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.items = state["items"]


class Rich(Stopped):
    """Everything that people put into attributes, and a loss that depends on all of it."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.critic = nn.Linear(2, 1)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=0.01)
        self.decay = torch.optim.lr_scheduler.ExponentialLR(self.critic_optimizer, 0.9)
        self.nets = {"a": nn.Linear(2, 1), "rest": [nn.Linear(1, 1)]}
        held = [*self.nets["a"].parameters(), *self.nets["rest"][0].parameters()]  # type: ignore[index, union-attr]
        self.optimizers = [torch.optim.SGD(held, lr=0.01, momentum=0.9)]
        self.memory = Memory()
        self.queue = torch.zeros(3)
        self.replaced = torch.zeros(1)
        self.recent: collections.deque[torch.Tensor] = collections.deque(maxlen=3)
        self.buffer = np.zeros(5)
        self.temperature, self.other = 1.0, 1.0  # the same object
        self.phase: str | None = None
        self.generator = torch.Generator().manual_seed(5)
        self.numpy_generator = np.random.default_rng(5)
        self.python_generator = random.Random(5)
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)

    def train_step(self, data: Any) -> Any:
        self.stop("train")
        inputs, _ = data
        drawn = (
            torch.rand((), generator=self.generator)
            + self.numpy_generator.random()
            + self.python_generator.random()
        )
        past = (
            self.memory.items.sum()
            + self.queue.sum()
            + self.replaced.sum()
            + sum(self.recent)
            + self.buffer.sum()
        )
        factor = (1.0 + 0.01 * (drawn + past)) * self.temperature * (0.5 if self.phase == "late" else 1.0)
        critic_loss = self.critic(inputs).square().mean() * factor + self.teacher(inputs).square().mean()
        self.advance(critic_loss, self.critic_optimizer)
        self.decay.step()
        nets: Any = self.nets
        self.advance(nets["rest"][0](nets["a"](inputs)).square().mean() * factor, self.optimizers[0])
        answer = SmallRunner.train_step(self, data)
        value = float(critic_loss.detach())
        self.memory.push(critic_loss)
        self.queue[self.steps % 3] = value
        self.replaced = self.replaced + value
        self.recent.append(torch.tensor(value))
        self.buffer[self.steps % 5] = value
        self.temperature *= 0.9
        self.other += 1.0
        self.phase = "late" if self.steps > 2 else "early"
        for mine, theirs in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            mine.data = mine.data * 0.9 + theirs.data * 0.1  # as people write it
        return answer

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def all(self) -> dict[str, Any]:
        nets: Any = self.nets
        modules = {"critic": self.critic, "teacher": self.teacher, "a": nets["a"], "b": nets["rest"][0]}
        return {
            "model": weights(self),
            **{name: [p.tolist() for p in module.parameters()] for name, module in modules.items()},
            "lr": self.critic_optimizer.param_groups[0]["lr"],
            "memory": self.memory.items.tolist(),
            "queue": self.queue.tolist(),
            "replaced": self.replaced.tolist(),
            "recent": [float(each) for each in self.recent],
            "buffer": self.buffer.tolist(),
            "temperature": self.temperature,
            "other": self.other,
            "phase": self.phase,
            "drawn": [float(torch.rand((), generator=self.generator)), self.numpy_generator.random()],
            "python": self.python_generator.random(),
        }


@pytest.mark.parametrize("where", [("train", 4), ("train", 6)])
def test_every_attribute_with_a_state_survives_a_resume(tmp_path: Path, where: tuple[str, int]) -> None:
    peace, again = in_peace(tmp_path, Rich), resumed(tmp_path, where, Rich)
    assert again.resumed is not None and again.bitwise
    assert again.results == peace.results
    assert again.all() == peace.all()


class Phase(enum.Enum):
    early = 1
    late = 2


class Agent:
    """An object of the user's own, without a state dict."""

    def __init__(self) -> None:
        self.net = nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)
        self.seen: list[float] = []
        self.best: float | None = None


class Values(Stopped):
    """Values of every kind that training changes in some way, and a loss that depends on all of them."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.agent = Agent()
        self.space = types.SimpleNamespace(net=nn.Linear(2, 1), count=0)
        self.means = [torch.zeros(1) for _ in range(100)]
        self.nets = [nn.Linear(1, 1) for _ in range(70)]
        self.center = torch.zeros(2)
        self.number: Any = 1.0
        self.single: Any = np.float32(0.1)
        self.until: Any = 3
        self.phase = Phase.early
        self.pair = (0.0, [1])
        self.history: list[float] = []
        self.numbers: list[int] = []
        self.windows: collections.deque[list[float]] = collections.deque([[0.0], [0.0]])
        self.ring = nn.Module()
        self.ring.register_buffer("values", torch.arange(4.0))
        self.counts: dict[str, Any] = {"seen": {"a": 0}, "names": set()}
        for n in range(20):
            setattr(self, f"mean{n}", torch.zeros(1))

    def train_step(self, data: Any) -> Any:
        self.stop("train")
        value = float(data[0].mean()) * (1.0 + 0.1 * self.all_in_one())
        agent = self.agent
        agent.net(data[0]).square().mean().backward()
        agent.optimizer.step()
        agent.optimizer.zero_grad()
        agent.seen.append(value)
        agent.best = value if agent.best is None else min(agent.best, value)
        self.space.count += 1
        with torch.no_grad():
            self.space.net.weight.mul_(0.9)
            self.nets[66].weight.mul_(0.9)
        self.means[90] = self.means[90] * 0.9 + value
        self.center.data.mul_(0.5).add_(value)
        self.number = np.float64(value)
        self.single = self.single * np.float32(0.9)
        self.until = None if self.steps > 1 else self.until
        self.phase = Phase.late if self.steps > 1 else self.phase
        self.pair = (value, [*self.pair[1], self.steps])
        self.windows[0].append(value)
        self.history += [value] * 40
        self.numbers += range(self.steps, self.steps + 40)
        self.ring.values = self.ring.values.roll(1)  # type: ignore[union-attr, operator]
        self.counts["seen"]["a"] += 1
        self.counts["names"].add(str(self.steps))
        self.made_later = getattr(self, "made_later", 0.0) + value
        for n in range(20):  # freed addresses are used again
            setattr(self, f"mean{n}", 0.9 * getattr(self, f"mean{n}") + value)
        return SmallRunner.train_step(self, data)

    def all_in_one(self) -> float:
        named = sum(self.history) + sum(self.numbers) + len(self.numbers)
        named += sum(float(getattr(self, f"mean{n}")) for n in range(20))
        held = [*self.agent.net.parameters(), *self.space.net.parameters(), self.nets[66].weight, *self.means]
        counted = (
            len(self.agent.seen) + self.space.count + len(self.counts["names"]) + self.counts["seen"]["a"]
        )
        later = getattr(self, "made_later", 0.0) + float(self.number) + float(self.single) + (self.until or 0)
        rest = self.phase.value + sum(self.pair[1]) + sum(map(sum, self.windows)) + (self.agent.best or 0.0)
        ring = float(self.ring.values[0])  # type: ignore[index]
        return (
            named
            + sum(float(p.sum()) for p in held)
            + counted
            + later
            + rest
            + ring
            + float(self.center.sum())
        )


@pytest.mark.parametrize("where", [("train", 4), *rarely([(("train", 6),), (("train", 1),)])])
def test_a_value_of_every_kind_survives_a_resume(tmp_path: Path, where: tuple[str, int]) -> None:
    peace, again = in_peace(tmp_path, Values), resumed(tmp_path, where, Values)
    assert again.resumed is not None and again.bitwise
    assert again.all_in_one() == peace.all_in_one() and type(again.single) is np.float32
    assert weights(again) == weights(peace) and again.pair == peace.pair and again.until is peace.until


class Made(Stopped):
    """Makes values of other types than those that were there, while it trains."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.phase: Any = None
        self.counter: Any = None
        self.recent: Any = None
        self.by_name: Any = collections.defaultdict(list)

    def train_step(self, data: Any) -> Any:
        self.stop("train")
        if self.phase is None:
            self.phase, self.counter, self.recent = (
                Phase.early,
                collections.Counter(),
                collections.deque(maxlen=2),
            )
        self.phase = Phase(1 + self.steps % 2)
        self.counter.update([self.steps % 3])
        self.recent.append(self.steps)
        self.by_name[str(self.steps % 2)].append(self.steps)
        return SmallRunner.train_step(self, data)


def test_values_of_another_type_than_at_first_are_made_again(tmp_path: Path) -> None:
    peace, again = in_peace(tmp_path, Made), resumed(tmp_path, ("train", 6), Made)
    assert again.bitwise
    for name in ("phase", "counter", "recent", "by_name"):
        assert getattr(again, name) == getattr(peace, name) and type(getattr(again, name)) is type(
            getattr(peace, name)
        )
    assert again.recent.maxlen == 2 and again.by_name["new"] == []


def test_an_object_that_training_made_cannot_be_put_back_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class MakesObjects(Stopped):
        def __init__(self, given: Any) -> None:
            super().__init__(given)
            self.thing: Any = None
            self.nets: list[Any] = []

        def train_step(self, data: Any) -> Any:
            self.stop("train")
            self.thing = self.thing or types.SimpleNamespace(count=0)
            self.thing.count += 1
            self.nets = self.nets or [nn.Linear(1, 1)]
            return SmallRunner.train_step(self, data)

    again = resumed(tmp_path, ("train", 4), MakesObjects)
    said = capsys.readouterr().err
    assert not again.bitwise and 0 < again.thing.count < 8
    assert "self.thing cannot be put back: a types:SimpleNamespace that was made while training" in said
    assert "self.nets cannot be put back" in said


def test_what_no_checkpoint_can_hold_is_said_and_not_called_bitwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    point = collections.namedtuple("point", "x y")

    class Unsaveable(Stopped):
        def __init__(self, given: Any) -> None:
            super().__init__(given)
            self.points: list[Any] = []

        def train_step(self, data: Any) -> Any:
            self.stop("train")
            self.points.append(point(self.steps, 1))
            return SmallRunner.train_step(self, data)

    again = resumed(tmp_path, ("train", 6), Unsaveable)
    said = capsys.readouterr().err
    assert not again.bitwise and "training had changed self.points" in said
    assert "training changes self.points, and no checkpoint can hold it (0 is a point)" in said


def test_results_name_the_loss_of_each_optimizer(tmp_path: Path) -> None:
    result = in_peace(tmp_path, Rich).results[0]["train"]
    assert {"loss", "loss_critic_optimizer", "loss_optimizers.0", "accuracy"} == set(result)


def test_the_log_says_at_its_start_which_attributes_every_checkpoint_holds(tmp_path: Path) -> None:
    runner = in_peace(tmp_path, Rich)
    lines = Path(runner.dir, "run.log").read_text().splitlines()
    [at] = [number for number, line in enumerate(lines) if "every checkpoint also holds" in line]
    assert not any("epoch" in line for line in lines[:at])
    named = lines[at].partition("every checkpoint also holds self.")[2].split(", self.")
    parts = {"critic", "teacher", "nets.a", "nets.rest.0", "critic_optimizer", "optimizers.0", "decay"}
    assert sorted(named) == sorted({*parts, "memory", "generator", "numpy_generator", "python_generator"})
    shared, own = runner.training_state.shared_state(), runner.training_state.rank_state()["attributes"]
    assert {*named} == {*shared["modules"], *shared["optimizers"], *own["states"]}
    plain = in_peace(tmp_path / "plain")
    assert "also holds" not in Path(plain.dir, "run.log").read_text()


def test_an_attribute_can_be_left_out(tmp_path: Path) -> None:
    class Without(Rich):
        def __init__(self, given: Any) -> None:
            super().__init__(given)
            self.training_state.ignore("memory", "queue")

    state = in_peace(tmp_path, Without).training_state.rank_state()["attributes"]
    assert "memory" not in state["states"] and "queue" not in state["values"]
    assert "recent" in state["values"]


def test_a_frozen_teacher_costs_a_checkpoint_nothing(tmp_path: Path) -> None:
    class Frozen(SmallRunner):
        def __init__(self, given: Any) -> None:
            super().__init__(given)
            self.teacher = nn.Linear(2, 2).requires_grad_(False)

    runner = Frozen(config(tmp_path))
    runner.train()
    assert runner.training_state.shared_state()["modules"] == {"teacher": None}


def test_other_names_of_the_same_thing_are_saved_once(tmp_path: Path) -> None:
    class Twice(SmallRunner):
        def __init__(self, given: Any) -> None:
            super().__init__(given)
            self.net, self.opt, self.layers = self.model, self.optimizer, nn.ModuleList([self.model])

    runner = Twice(config(tmp_path))
    runner.train()
    state = runner.training_state.shared_state()
    assert state["modules"] == {} and state["optimizers"] == {}


def test_a_state_that_cannot_be_saved_is_refused_before_the_first_step(tmp_path: Path) -> None:
    class Odd(Memory):
        def state_dict(self) -> dict[str, Any]:
            return {"items": object()}

    class Holds(SmallRunner):
        def __init__(self, given: Any) -> None:
            super().__init__(given)
            self.odd = Odd()

    runner = Holds(config(tmp_path))
    with pytest.raises(CheckpointError, match=r"'odd'.*'items'.*convert it"):
        runner.train()
    assert runner.steps == 0


# groups and gradients that change while training


class Unfreezes(Stopped):
    """Trains a second layer, and a group of its own, from the second epoch on; keeps its BatchNorm in eval mode."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        self.model[1].eval().requires_grad_(False)
        self.model[2].requires_grad_(False)
        self.optimizer = torch.optim.SGD(self.model[0].parameters(), lr=0.1, momentum=0.9)

    def train_epoch(self, split: str = "train") -> Any:
        if self.epochs == 1 and len(self.optimizer.param_groups) == 1:
            layers: Any = self.unwrap(self.model)
            layers[2].requires_grad_(True)
            self.optimizer.add_param_group({"params": list(layers[2].parameters()), "lr": 0.01})
        return super().train_epoch(split)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def test_a_group_that_is_added_while_training_is_stepped_cleared_and_resumed(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"epoch_end": 3, "clip_grad_norm": 0.1}
    peace = in_peace(tmp_path, Unfreezes, **fields)
    assert all(parameter.grad is None for parameter in peace.model.parameters())
    assert [group["lr"] for group in peace.optimizer.param_groups] == [0.1, 0.01]
    again = resumed(tmp_path, ("train", 9), Unfreezes, **fields)
    assert weights(again) == weights(peace) and again.results == peace.results


def test_a_module_that_was_put_into_eval_mode_stays_there(tmp_path: Path) -> None:
    runner = in_peace(tmp_path, Unfreezes, epoch_end=2)
    assert runner.model[1].running_mean.tolist() == [0.0, 0.0, 0.0]
    assert runner.model.training and not runner.model[1].training


# what is refused


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda r: torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), "holds none of the parameters"),
        (
            lambda r: torch.optim.SGD([*r.model.parameters(), nn.Parameter(torch.ones(3))], lr=0.1),
            r"1 parameter\(s\) of no module of the runner, the first of shape \(3,\)",
        ),
        (lambda r: torch.optim.LBFGS(r.model.parameters()), "LBFGS, which evaluates the loss several times"),
    ],
)
def test_an_optimizer_that_cannot_train_the_runner_is_refused(
    tmp_path: Path, made: Any, message: str
) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.optimizer = made(runner)
    with pytest.raises(ConfigError, match=message):
        runner.train()
    assert runner.steps == 0


def test_an_accumulation_window_without_its_last_advance_is_refused(tmp_path: Path) -> None:
    class Skips(SmallRunner):
        def train_step(self, data: Any) -> Any:
            return None if self.current_step.ends_window else super().train_step(data)

    with pytest.raises(ConfigError, match="with the last batch of an accumulation window"):
        Skips(config(tmp_path, accum_steps=2)).train()


def test_counters_inside_a_step(tmp_path: Path) -> None:
    seen: list[tuple[int, int, int]] = []

    class Watches(SmallRunner):
        def train_step(self, data: Any) -> Any:
            before = self.iters
            answer = super().train_step(data)
            seen.append((before, self.iters, self.steps))
            return answer

    Watches(config(tmp_path, accum_steps=2, epoch_end=1)).train()
    assert seen == [(0, 0, 0), (1, 1, 1), (2, 2, 1), (3, 3, 2)]


# saves in the wrong moment


class Saves(Stopped):
    place = ""

    def train_step(self, data: Any) -> Any:
        if self.place == "step" and self.steps == 1:
            self.save_checkpoint("mine")
        return super().train_step(data)

    def evaluate_step(self, data: Any) -> Any:
        if self.place == "evaluation":
            self.save_checkpoint("mine")
        return super().evaluate_step(data)


@pytest.mark.parametrize("place", ["step", "evaluation"])
def test_a_save_inside_a_step_holds_a_whole_state(tmp_path: Path, place: str) -> None:
    fields: dict[str, Any] = {"ema_decay": 0.5, "params": {"width": 4, "dropout": 0.5}, "accum_steps": 2}
    peace = in_peace(tmp_path, **fields)
    first = Saves(config(tmp_path / "saves", **fields))
    first.place, first.stop_in = place, ("train", 2)
    with pytest.raises(Exception, match="asked"):
        first.train()
    store = first.run_session.files
    from danling_core.checkpoints.store import CheckpointStore

    records = CheckpointStore(first.checkpoint_dir)
    mine = records.pointed("mine")
    assert mine is not None and store is not None
    other = Saves(config(tmp_path / "other", **fields))
    other.load_checkpoint(f"{first.checkpoint_dir}/mine")
    other.train()
    assert weights(other) == weights(peace) and other.results == peace.results


class SavesInAdvance(Stopped):
    """Saves in its third step, before the weights change or right after."""

    is_before = True

    def advance(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        if self.is_before and self.iters == 2:
            self.save_checkpoint("mine")
        super().advance(loss, optimizer)
        if not self.is_before and self.iters == 2:
            self.save_checkpoint("mine")


@pytest.mark.parametrize("is_before", [True, False])
@pytest.mark.parametrize(("accum_steps", "iters", "steps"), [(1, 3, 3), (2, 4, 2)])
def test_a_save_inside_advance_waits_for_the_end_of_the_window(
    tmp_path: Path, is_before: bool, accum_steps: int, iters: int, steps: int
) -> None:
    from danling_core.checkpoints.store import CheckpointStore

    fields: dict[str, Any] = {"params": {"width": 4, "dropout": 0.5}, "accum_steps": accum_steps}
    peace = in_peace(tmp_path, **fields)
    first = SavesInAdvance(config(tmp_path / "saves", **fields))
    first.is_before = is_before
    first.train()
    mine = CheckpointStore(first.checkpoint_dir).pointed("mine")
    assert mine is not None and mine.progress == {"iters": iters, "steps": steps, "epochs": 0}
    other = Stopped(config(tmp_path / "other", **fields))
    other.load_checkpoint(f"{first.checkpoint_dir}/mine")
    other.train()
    assert weights(first) == weights(other) == weights(peace) and other.results == peace.results


def test_a_state_inside_a_step_is_refused(tmp_path: Path) -> None:
    class Asks(SmallRunner):
        def train_step(self, data: Any) -> Any:
            self.state_dict()
            return super().train_step(data)

    with pytest.raises(ConfigError, match="half of it"):
        Asks(config(tmp_path)).train()
