"""Optimizers and schedulers by name, parameter groups, and the rule of linear scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CyclicLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

from danling_core.errors import ConfigError
from danling_core.optim.optimizers import build_optimizer, optimizer_class, parameter_groups
from danling_core.optim.schedulers import Shape, build_scheduler, check_scheduler, default_interval
from tests.small_runner import SmallRunner, config


def sgd(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=lr)


@pytest.mark.holds("attributes-12")
@pytest.mark.parametrize(("name", "cls"), [("adamw", torch.optim.AdamW), ("SGD", torch.optim.SGD)])
def test_an_optimizer_is_found_in_any_letter_case(name: str, cls: type) -> None:
    optimizer = build_optimizer(name, nn.Linear(2, 2).parameters(), lr=0.25, weight_decay=0.5)
    assert type(optimizer) is cls
    assert optimizer.param_groups[0]["lr"] == 0.25 and optimizer.param_groups[0]["weight_decay"] == 0.5


def test_a_rate_is_the_classs_own_where_none_is_given() -> None:
    assert build_optimizer("adamw", nn.Linear(2, 2).parameters()).param_groups[0]["lr"] == 1e-3


@pytest.mark.holds("training-9")
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adagrad"])
def test_a_fused_optimizer_takes_the_same_steps(name: str) -> None:
    weights = []
    for extra in ({}, {"foreach": False}):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = build_optimizer(name, model.parameters(), lr=0.05, **extra)
        assert bool(optimizer.param_groups[0].get("fused")) == (not extra)
        for _ in range(5):
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(model.weight.detach().clone())
    torch.testing.assert_close(*weights)


def test_an_optimizer_without_a_fused_kernel_is_built_all_the_same() -> None:
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    assert build_optimizer("adamw", [parameter], lr=0.1).param_groups[0]["params"] == [parameter]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("adamww", {}, "AdamW"),
        ("adamw", {"weight_decai": 0.1}, "did you mean 'weight_decay'"),
        ("sgd", {"betas": [0.9, 0.99]}, "unknown key 'optim.betas' for SGD"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        optimizer_class(name, arguments)


def test_an_argument_that_the_class_refuses_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="optim: sgd refuses"):
        build_optimizer("sgd", nn.Linear(2, 2).parameters(), lr=0.1, momentum=-1.0)


# groups -----------------------------------------------------------------------------------------------------
@pytest.mark.holds("training-9")
def test_parameters_are_grouped_by_the_first_pattern_that_matches() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    rules: list[dict[str, Any]] = [{"match": "bias$|^1", "weight_decay": 0.0}, {"match": "^2", "lr": 0.5}]
    groups = parameter_groups(model, rules)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [[names[p] for p in group["params"]] for group in groups] == [
        ["0.bias", "1.weight", "1.bias", "2.bias"],
        ["2.weight"],
        ["0.weight"],
    ]
    assert groups[0]["weight_decay"] == 0.0 and groups[1]["lr"] == 0.5 and set(groups[2]) == {"params"}


def test_words_name_what_has_no_weight_decay(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, [{"match": "^3", "lr": 0.5}], ["bias", "Norm", "embed"])
    found = [
        ([names[p] for p in group["params"]], group.get("lr"), group.get("weight_decay")) for group in groups
    ]
    assert found == [
        (["3.weight"], 0.5, None),
        (["3.bias"], 0.5, 0.0),
        (["1.weight"], None, None),
        (["0.weight", "1.bias", "2.weight", "2.bias"], None, 0.0),
    ]
    with pytest.raises(ConfigError, match="optim.no_decay: 'conv' is in no parameter's name"):
        parameter_groups(model, [], ["bias", "conv"])
    optim = {"name": "adamw", "lr": 0.1, "weight_decay": 0.5, "no_decay": ["bias"]}
    runner = SmallRunner(config(tmp_path, optim=optim, epoch_end=1))
    runner.train()
    assert [group["weight_decay"] for group in runner.optimizer.param_groups] == [0.5, 0.0]


@pytest.mark.parametrize(
    ("group", "words"),
    [({"match": "nothing"}, "no parameter's name matches 'nothing'"), ({"lr": 1.0}, "needs `match`")],
)
def test_a_group_that_means_nothing_is_refused(group: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parameter_groups(nn.Linear(2, 2), [group])


def test_an_argument_of_a_group_that_the_class_does_not_know_is_refused() -> None:
    groups = parameter_groups(nn.Linear(2, 2), [{"match": "bias", "weight_decai": 0.0}])
    with pytest.raises(ConfigError, match=r"optim.groups.weight_decai.*did you mean 'weight_decay'"):
        build_optimizer("adamw", groups, lr=0.1)


@pytest.mark.holds("training-9")
def test_groups_come_from_the_config(tmp_path: Path) -> None:
    optim = {"name": "sgd", "lr": 0.2, "groups": [{"match": "bias", "lr": 0.0}]}
    runner = SmallRunner(config(tmp_path, optim=optim))
    bias, weight = runner.model.bias.tolist(), runner.model.weight.tolist()
    runner.train()
    assert runner.model.bias.tolist() == bias and runner.model.weight.tolist() != weight
    assert [group["lr"] for group in runner.optimizer.param_groups] == [0.0, 0.2]


@pytest.mark.holds("attributes-12")
def test_groups_are_set_by_hand_too(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.optimizer = torch.optim.SGD(
        [{"params": [runner.model.weight], "lr": 0.0}, {"params": [runner.model.bias]}], lr=0.1
    )
    weight = runner.model.weight.tolist()
    runner.train()
    assert runner.model.weight.tolist() == weight


def test_an_optimizer_is_needed(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.optimizer = None
    with pytest.raises(ConfigError, match="no optimizer"):
        runner.train()


# schedulers -------------------------------------------------------------------------------------------------
@pytest.mark.holds("training-6")
@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.5, 0.0]),
        ("cosine", [0.5, 1.0, 1.0, 0.5, 0.0]),
    ],
)
def test_shapes_warm_up_and_decay(shape: str, wanted: list[float]) -> None:
    found = [Shape(shape, 4, warmup_steps=2).factor(step) for step in (0, 1, 2, 3, 9)]
    assert found == pytest.approx(wanted)


def test_a_floor_is_where_the_decay_ends() -> None:
    assert Shape("cosine", 10, floor=0.1).factor(10) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            {"name": "linear", "hold_steps": 3, "warmup_steps": 1},
            [1, 1, 1, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0],
        ),
        ({"name": "linear", "hold_steps": 0.5, "floor": 0.5}, [1, 1, 1, 1, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5]),
        (
            {"name": "wsd", "warmup_steps": 2, "cooldown_steps": 4},
            [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0],
        ),
        ({"name": "wsd"}, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]),
        (
            {"name": "wsd", "cooldown_steps": 0.4, "cooldown": "sqrt"},
            [*[1] * 7, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0],
        ),
        ({"name": "wsd", "cooldown_steps": 2, "cooldown": "cosine", "floor": 0.2}, [*[1] * 9, 0.6, 0.2]),
        ({"name": "cosine", "total_steps": 4}, [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, *[0] * 7]),
    ],
)
def test_parts_of_a_schedule(arguments: dict[str, Any], wanted: list[float]) -> None:
    optimizer = sgd()
    scheduler = build_scheduler(optimizer=optimizer, **{"total_steps": 10, **arguments})
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ({"name": "constant", "hold_steps": 3}, "unknown key 'scheduler.hold_steps'"),
        ({"name": "wsd", "cooldown_step": 3}, "did you mean 'scheduler.cooldown_steps'"),
        (
            {"name": "wsd", "cooldown_steps": 1.0},
            "scheduler.cooldown_steps is 1.0, wanted a number of steps, or a",
        ),
        (
            {"name": "wsd", "cooldown": "steep"},
            "scheduler.cooldown is 'steep', wanted one of linear, cosine, sqrt",
        ),
        ({"name": "linear", "floor": 2}, r"scheduler.floor is 2.*, wanted a factor in \[0, 1\]"),
        ({"name": "linear", "hold_steps": -1}, "scheduler.hold_steps is -1.*wanted a number of steps"),
        ({"name": "linear", "total_steps": 0}, "scheduler.total_steps is 0.*wanted a number of steps >= 1"),
        (
            {"name": "linear", "warmup_steps": 1.0},
            "scheduler.warmup_steps: wanted a number of steps >= 0, or a share",
        ),
    ],
)
def test_parts_that_make_no_sense_are_refused(scheduler: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        SmallRunner(config(tmp_path, scheduler=scheduler, optim={"name": "sgd", "lr": 0.1})).train()
    assert not list(tmp_path.iterdir())


def test_a_decay_needs_a_known_number_of_steps() -> None:
    with pytest.raises(ConfigError, match="needs the number of steps"):
        build_scheduler("cosine", sgd(), total_steps=None)
    build_scheduler("constant", sgd(), total_steps=None, warmup_steps=3)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("cosin", {}, "scheduler.name is 'cosin'"),
        ("StepLR", {"gama": 0.1}, "did you mean 'gamma'"),
        ("cosine", {"T_max": 3}, "unknown key 'scheduler.T_max'"),
    ],
)
def test_unknown_schedules_are_refused(name: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_scheduler(name, arguments)


def test_a_missing_argument_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="scheduler: StepLR refuses"):
        build_scheduler("StepLR", sgd(), total_steps=5)
    with pytest.raises(ConfigError, match="warmup_steps goes with"):
        build_scheduler("StepLR", sgd(), total_steps=5, warmup_steps=2, step_size=1)


@pytest.mark.parametrize("name", ["OneCycleLR", "one_cycle"])
def test_one_cycle_is_told_the_length_of_the_run(name: str) -> None:
    scheduler = build_scheduler(name, sgd(), total_steps=12, max_lr=0.5)
    assert isinstance(scheduler, OneCycleLR) and scheduler.total_steps == 12


@pytest.mark.parametrize(
    ("scheduler", "by_epoch", "interval"),
    [
        (StepLR(sgd(), 1), True, "epoch"),
        (ConstantLR(sgd()), True, "epoch"),
        (StepLR(sgd(), 1), False, "step"),
        (LambdaLR(sgd(), lambda step: 1.0), True, "step"),
        (OneCycleLR(sgd(), 1.0, 10), True, "step"),
        (CyclicLR(sgd(), 0.1, 1.0), True, "step"),
        (ReduceLROnPlateau(sgd()), False, "epoch"),
    ],
)
def test_what_a_schedule_counts_follows_from_its_class(scheduler: Any, by_epoch: bool, interval: str) -> None:
    assert default_interval(scheduler, by_epoch=by_epoch) == interval


# the linear scaling rule ------------------------------------------------------------------------------------


@pytest.mark.holds("methods-6")
@pytest.mark.parametrize("arguments", [{}, {"lr_scale_factor": 2.0, "batch_size_base": 8}])
def test_scale_lr_needs_one_of_factor_and_base(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        SmallRunner(config(tmp_path)).scale_lr(0.1, **arguments)


def test_an_argument_of_the_wrong_type_is_named() -> None:
    with pytest.raises(ConfigError, match="adamw refuses its arguments"):
        build_optimizer("adamw", [torch.nn.Parameter(torch.zeros(2))], lr=0.1, betas=3)


def test_an_optimizer_that_wants_a_closure_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match="LBFGS.*closure"):
        build_optimizer("lbfgs", [torch.nn.Parameter(torch.zeros(2))])
