"""Seeds that are obeyed, differ between ranks where they should, and are the same run after run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import danling_core as dl
from danling_core.parallel import seeding
from tests.small_runner import SmallRunner, config, points, weights


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_every_generator_follows_the_seed(seed: int) -> None:
    assert seeding.seed_everything(seed) == seed
    first = draws()
    seeding.seed_everything(seed)
    assert draws() == first
    seeding.seed_everything(seed + 1)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_generators_are_captured_and_put_back() -> None:
    seeding.seed_everything(5)
    state = seeding.capture_rng()
    first = draws()
    seeding.restore_rng(state)
    assert draws() == first


class Built(dl.TorchRunner):
    """As a user writes one: what is drawn right after `super().__init__` comes from the seed of the config."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.model = nn.Linear(2, 2)
        self.datasets["train"] = TensorDataset(*points(20))
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)


@pytest.mark.holds("attributes-3", "bugs-1")
def test_seed_0_is_a_seed_and_a_users_seed_is_applied_before_the_user_builds(tmp_path: Path) -> None:
    by_seed = {seed: weights(Built(config(tmp_path, seed=seed))) for seed in (0, 1, 0)}
    torch.manual_seed(0)
    wanted = weights_of(nn.Linear(2, 2))
    assert by_seed[0] == wanted != by_seed[1]
    assert Built(config(tmp_path, seed=0)).seed == 0


def weights_of(module: nn.Module) -> list[float]:
    return torch.cat([value.double().flatten() for value in module.state_dict().values()]).tolist()


def test_the_same_seed_trains_the_same_bits_and_another_does_not(tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b", "cc"):
        fields = {"seed": len(name), "params": {"width": 4, "dropout": 0.3}}
        runs.append(SmallRunner(config(tmp_path / name, **fields)))
        runs[-1].train()
    assert weights(runs[0]) == weights(runs[1]) != weights(runs[2])


@pytest.fixture
def torch_flags() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@pytest.mark.holds("attributes-3")
@pytest.mark.usefixtures("torch_flags")
def test_deterministic_asks_torch_only_where_it_is_wanted(tmp_path: Path) -> None:
    assert not SmallRunner(config(tmp_path)).deterministic
    assert not torch.are_deterministic_algorithms_enabled()
    assert SmallRunner(config(tmp_path, deterministic=True)).deterministic
    assert torch.are_deterministic_algorithms_enabled()
