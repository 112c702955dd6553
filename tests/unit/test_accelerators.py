"""Which device a rank gets. No accelerator is here: what torch would find is said for it, and nothing runs on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from danling_core.config import Config
from danling_core.errors import ConfigError
from danling_core.launch.prepare import ranks_per_node
from danling_core.metrics.meters import MeanMeter
from danling_core.optim.precision import Precision
from danling_core.parallel import accelerators
from danling_core.parallel.distributed import resolve_device


def finds(monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int = 1) -> None:
    monkeypatch.setattr(accelerators, "kind_here", lambda: kind)
    monkeypatch.setattr(accelerators, "count", lambda kind: 1 if kind == "mps" else count)


@pytest.mark.parametrize(
    ("kind", "count", "wanted", "ranks", "device"),
    [
        (None, 0, "auto", 2, "cpu"),
        ("cuda", 2, "auto", 2, "cuda:0"),
        ("xpu", 2, "auto", 2, "xpu:0"),
        ("xpu", 2, "xpu", 1, "xpu:0"),
        ("xpu", 2, "cpu", 2, "cpu"),
        ("mps", 1, "auto", 1, "mps"),
        ("mps", 1, "mps", 1, "mps"),
        ("mps", 1, "auto", 3, "cpu"),  # one GPU belongs to one rank
    ],
)
def test_a_rank_gets_the_accelerator_that_torch_finds(
    monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int, wanted: str, ranks: int, device: str
) -> None:
    finds(monkeypatch, kind, count)
    assert resolve_device(wanted, ranks) == torch.device(device)


@pytest.mark.parametrize(
    ("kind", "wanted", "ranks", "message"),
    [
        (None, "mps", 1, "device is 'mps', but torch finds no GPU here"),
        ("cuda", "xpu", 1, "device is 'xpu', but torch finds cuda"),
        ("mps", "mps", 2, "2 ranks on this node and 1 GPU"),
        ("xpu", "xpu", 4, "4 ranks on this node and 2 GPU"),
    ],
)
def test_an_accelerator_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: str | None, wanted: str, ranks: int, message: str
) -> None:
    finds(monkeypatch, kind, 2)
    with pytest.raises(ConfigError, match=message):
        resolve_device(wanted, ranks)


def test_auto_ranks_are_the_devices_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, count, ranks in ((None, 0, 1), ("cuda", 4, 4), ("xpu", 3, 3), ("mps", 1, 1)):
        finds(monkeypatch, kind, count)
        assert ranks_per_node(Config(epoch_end=1)) == ranks
        assert ranks_per_node(Config(epoch_end=1, device="cpu")) == 1


def test_each_kind_has_its_collectives() -> None:
    assert accelerators.backend("cpu") == accelerators.backend("mps") == "gloo"
    assert accelerators.backend("cuda") == "cpu:gloo,cuda:nccl"
    assert accelerators.backend("xpu") == "cpu:gloo,xpu:xccl"


def test_this_machine_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = torch.accelerator.current_accelerator(check_available=True)
    assert accelerators.kind_here() == (None if found is None else found.type)
    assert set(accelerators.generator_states()) <= set(accelerators.KINDS)


def test_a_precision_that_a_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: kind != "mps")
    with pytest.raises(ConfigError, match="precision is 'bf16', which torch does not have on mps"):
        Precision("bf16", "mps", skip_non_finite=False)
    Precision("fp32", "mps", skip_non_finite=False)


class OnMps:
    """A number that says that it is on Apple's GPU, which has no float64."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.device: Any = torch.device("mps")

    def cpu(self) -> torch.Tensor:
        return torch.tensor(self.value)


def test_means_are_summed_where_there_is_float64() -> None:
    meter = MeanMeter()
    meter.add(OnMps(3.0), 4)  # type: ignore[arg-type]
    assert meter.compute() == 0.75 and meter.state().dtype == torch.float64
