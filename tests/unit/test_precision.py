"""Mixed precision: contexts that are entered, a scaler that scales, and the same result within tolerance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from danling_core.optim.precision import Precision
from tests.small_runner import SmallRunner, config


class Looks(SmallRunner):
    """Keeps the types that its forward passes gave, and whether a gradient was scaled."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.types: dict[str, set[torch.dtype]] = {"train": set(), "evaluate": set(), "infer": set()}
        self.model.register_forward_hook(lambda *passed: self.types[self.mode].add(passed[-1].dtype))


@pytest.mark.holds("training-3", "bugs-2")
@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_every_forward_pass_is_in_the_asked_precision(
    precision: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    runner = Looks(config(tmp_path, precision=precision, params={"width": 8}, epoch_end=4))
    results = runner.train()
    runner.infer("val")
    assert runner.types == {"train": {dtype}, "evaluate": {dtype}, "infer": {dtype}}
    assert all(parameter.dtype is torch.float32 for parameter in runner.model.parameters())
    plain = SmallRunner(config(tmp_path / "plain", params={"width": 8}, epoch_end=4)).train()
    assert results[3]["train"]["loss"] == pytest.approx(plain[3]["train"]["loss"], abs=0.02)


@pytest.mark.holds("training-3")
def test_only_fp16_scales(tmp_path: Path) -> None:
    assert Precision("fp32", "cpu", skip_non_finite=False).make_scaler() is None
    assert Precision("bf16", "cpu", skip_non_finite=False).make_scaler() is None
    scaler = Precision("fp16", "cpu", skip_non_finite=False).make_scaler()
    assert scaler is not None and scaler.get_scale() > 1


@pytest.mark.holds("bugs-2")
def test_gradients_are_unscaled_before_the_step(tmp_path: Path) -> None:
    plain, scaled = (
        SmallRunner(config(tmp_path / name, precision=name, epoch_end=1)) for name in ("bf16", "fp16")
    )
    plain.train()
    scaled.train()
    first, second = torch.tensor(plain.gradients[0]), torch.tensor(scaled.gradients[0])
    assert second.norm() > 1000 * first.norm()  # as the loss was scaled
    for runner in (plain, scaled):
        moved = runner.model.weight.detach() - SmallRunner(config(tmp_path)).model.weight.detach()
        assert 0 < moved.norm() < 1


def test_the_scale_stays_1_where_it_is_there_to_skip() -> None:
    precision = Precision("fp32", "cpu", skip_non_finite=True)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = precision.make_scaler()
    assert scaler is not None
    for value in (float("inf"), 1.0, float("nan"), 1.0):
        scaler.scale((weight * value).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        precision.update(scaler)
        optimizer.zero_grad()
        assert scaler.get_scale() == 1.0
    assert weight.tolist() == [-1.0, -1.0]


def test_the_scaler_survives_a_resume(tmp_path: Path) -> None:
    class Stops(SmallRunner):
        def train_epoch(self, split: str = "train") -> dict[str, Any]:
            if self.epochs == 1 and not self.resumed:
                raise KeyboardInterrupt
            if self.epochs == 0:
                scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
                self.training_state.shared["scalers"].load({"optimizer": scaler.state_dict()})
            return super().train_epoch(split)

    with pytest.raises(KeyboardInterrupt):
        Stops(config(tmp_path, precision="fp16")).train()
    again = Stops(config(tmp_path, precision="fp16"))
    again.train()
    assert again.state_dict()["scalers"]["optimizer"]["scale"] == 2.0**7


def test_fp32_costs_no_context() -> None:
    precision = Precision("fp32", "cpu", skip_non_finite=False)
    with precision.autocast():
        assert not torch.is_autocast_enabled("cpu")
    with Precision("bf16", "cpu", skip_non_finite=False).autocast():
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("is_native", "warnings"), [(True, 0), (False, 1)])
def test_bf16_that_the_cpu_emulates_is_warned_of(
    is_native: bool, warnings: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("danling_core.runner.set_up.is_bf16_native", lambda: is_native)
    runner = SmallRunner(config(tmp_path, precision="bf16", epoch_end=1))
    runner.train()
    assert Path(runner.dir, "run.log").read_text().count("bf16 is emulated") == warnings
