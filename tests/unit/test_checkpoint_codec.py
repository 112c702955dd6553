"""States to bytes and back: only plain things, compactly, and never code."""

from __future__ import annotations

import collections
import datetime
import enum
import io
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from danling_core.checkpoints import CheckpointStore, dump, load, load_state
from danling_core.errors import CheckpointCorrupt, CheckpointError


def round_trip(state: Any, folder: Path) -> Any:
    path = folder / "state.pt"
    with open(path, "wb") as file:
        dump(state, file)
    return load(str(path))


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    convolution = torch.nn.Conv2d(3, 4, 3)
    convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
    model = torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def test_model_optimizer_and_schedulers_come_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    schedulers = [
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5]),
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10),
        torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
            ],
            [3],
        ),
    ]
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedulers": [each.state_dict() for each in schedulers],
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
    }
    loaded = round_trip(state, tmp_path)
    for name, tensor in model.state_dict().items():
        assert (
            torch.equal(loaded["model"][name], tensor) and loaded["model"][name].stride() == tensor.stride()
        )
    moments, again = optimizer.state_dict()["state"][0], loaded["optimizer"]["state"][0]
    assert torch.equal(again["exp_avg_sq"], moments["exp_avg_sq"])
    assert again["exp_avg_sq"].stride() == moments["exp_avg_sq"].stride()
    assert loaded["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    assert loaded["schedulers"][0]["milestones"] == collections.Counter([3, 3, 5])
    assert loaded["model"]._metadata == getattr(model.state_dict(), "_metadata")  # noqa: B009
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    for scheduler, saved in zip(schedulers, loaded["schedulers"], strict=True):
        scheduler.load_state_dict(saved)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(2**70),
        0.1,
        float("inf"),
        1 + 2j,
        "text",
        b"\x00\xff",
        bytearray(b"x"),
        (1, (2, [3])),
        [],
        {},
        {"a": {1: {2.5: None}}, (1, "b"): 2},
        {1, 2},
        random.getstate(),
        torch.float16,
        torch.Size([2, 3]),
        torch.device("cpu"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_values_come_back_as_they_were(value: Any, tmp_path: Path) -> None:
    loaded = round_trip({"x": value}, tmp_path)["x"]
    assert loaded == value and type(loaded) is type(value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.get_rng_state(),
        torch.tensor(3.0),
        torch.empty(0, 3),
        torch.ones(3, dtype=torch.bfloat16),
        torch.randn(3, 4).t(),
        torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 6)[:, ::2],
        torch.ones(1).expand(5),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.eye(3).to_sparse(),
        torch.nn.Parameter(torch.randn(3)),
        torch.randn(3, requires_grad=True) * 2,
    ],
    ids=lambda tensor: f"{tensor.layout}-{tensor.dtype}-{tuple(tensor.shape)}".replace("torch.", ""),
)
def test_any_kind_of_tensor_comes_back_equal(tensor: torch.Tensor, tmp_path: Path) -> None:
    loaded = round_trip({"x": tensor}, tmp_path)["x"]
    assert loaded.dtype == tensor.dtype and loaded.shape == tensor.shape and not loaded.requires_grad
    assert torch.equal(loaded.to_dense() if loaded.is_sparse else loaded, tensor.to_dense())


def test_numpy_becomes_tensors_and_python_numbers(tmp_path: Path) -> None:
    state = {
        "scalar": np.float64(0.1),
        "int": np.int64(7),
        "bool": np.bool_(True),
        "array": np.arange(6).reshape(2, 3)[:, ::-1],
        "big endian": np.arange(3, dtype=">i4"),
        "rng": np.random.get_state(),
        np.int64(3): np.str_("x"),
    }
    loaded = round_trip(state, tmp_path)
    assert type(loaded["scalar"]) is float and loaded["scalar"] == 0.1
    assert type(loaded["int"]) is int and loaded["bool"] is True
    assert loaded["array"].tolist() == [[2, 1, 0], [5, 4, 3]] and loaded["big endian"].tolist() == [0, 1, 2]
    assert loaded["rng"][1].dtype == torch.uint32
    assert type(loaded[3]) is str


class Colour(enum.IntEnum):
    RED = 1


class Point(NamedTuple):
    x: int


class Own:
    pass


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "value",
    [
        datetime.datetime(2026, 1, 1),
        Path("x"),
        Colour.RED,
        Point(1),
        Own(),
        Own,
        len,
        collections.deque([1]),
        frozenset([1]),
        np.array([object()]),
        np.datetime64("2026-01-01"),
        torch.randn(2).as_subclass(Subclass),
        torch.empty(2, device="meta"),
        torch.Generator(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_could_not_be_loaded_again_is_refused_with_its_path(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"state\['params'\]\[0\]\['x'\] is a "):
        dump({"params": [{"x": value}]}, io.BytesIO())


def test_a_refused_key_and_a_state_that_contains_itself_are_clear_errors() -> None:
    with pytest.raises(CheckpointError, match="Own"):
        dump({"a": {Own(): 1}}, io.BytesIO())
    state: dict[str, Any] = {}
    state["again"] = state
    with pytest.raises(CheckpointError, match="contain itself"):
        dump(state, io.BytesIO())


def test_a_view_is_saved_without_its_base_and_shared_memory_once(tmp_path: Path) -> None:
    base, other, tied = torch.arange(100_000.0), torch.arange(1000.0), torch.randn(50)
    state = {
        "small": [base[10:20], base.view(1000, 100)[:, 3]],
        "overlapping": [other[100:110], other[105:115], other[900:]],
        "tied": [tied, tied.detach(), tied.view(5, 10)],
    }
    loaded = round_trip(state, tmp_path)
    assert os.path.getsize(tmp_path / "state.pt") < 10_000
    for key, tensors in state.items():
        for before, after in zip(tensors, loaded[key], strict=True):
            assert torch.equal(before, after)
    first, second, reshaped = loaded["tied"]
    assert first.data_ptr() == second.data_ptr() == reshaped.data_ptr()
    assert loaded["overlapping"][1].data_ptr() - loaded["overlapping"][0].data_ptr() == 5 * 4


def test_views_of_other_element_sizes_in_one_storage_stay_aligned(tmp_path: Path) -> None:
    raw = torch.arange(64, dtype=torch.uint8)
    state = [raw[4:40], raw[8:24].view(torch.float64), raw[36:40].view(torch.int32)]
    for before, after in zip(state, round_trip(state, tmp_path), strict=True):
        assert torch.equal(before.view(torch.uint8), after.view(torch.uint8))


def test_dump_leaves_the_state_and_torch_settings_alone() -> None:
    state: dict[str, Any] = {"x": torch.arange(10)[2:4], "y": {"z": [torch.ones(2)]}}
    inner = state["y"]
    dump(state, io.BytesIO())
    assert state["y"] is inner and torch.equal(state["x"], torch.tensor([2, 3]))
    assert torch.serialization.get_crc32_options() is True


# Loading


class Malicious:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.victim),)


def plain_pickle(value: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


def torch_zip(value: Any, path: Path) -> None:
    torch.save(value, path)


def torch_legacy(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [plain_pickle, torch_zip, torch_legacy])
def test_a_malicious_checkpoint_is_refused_and_never_runs(
    write: Callable[[Any, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    victim, path = tmp_path / "victim", tmp_path / "evil.pt"
    write({"model": Malicious(victim)}, path)
    with pytest.raises(CheckpointError, match="refused"):
        load(str(path))
    store = CheckpointStore(str(tmp_path / "checkpoints"))
    record = store.commit(lambda file: file.write(path.read_bytes()), step=1, attempt="1.0", info={})
    with pytest.raises(CheckpointError, match="refused"):
        load_state(store, record)
    assert not victim.exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_cut_file_is_corrupt(share: float, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save({"x": torch.randn(1000)}, path)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(CheckpointCorrupt, match="state.pt"):
        load(str(path))


def test_a_file_that_is_no_checkpoint_or_not_there_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello, this is not a checkpoint")
    with pytest.raises(CheckpointError, match="text"):
        load(str(tmp_path / "text"))
    with pytest.raises(CheckpointError, match="missing"):
        load(str(tmp_path / "missing"))


@pytest.mark.parametrize("url", ["{folder}/checkpoints", "memory://codec/{name}"])
def test_load_state_reads_a_committed_state_from_anywhere(url: str, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    store = CheckpointStore(url.format(folder=tmp_path, name=tmp_path.name), scratch=str(scratch))
    record = store.commit(lambda file: dump({"x": torch.ones(3)}, file), step=1, attempt="1.0", info={})
    assert torch.equal(load_state(store, record)["x"], torch.ones(3))
    assert not [name for _, _, files in os.walk(scratch) for name in files], "no download is left"
    listed = store.commit(lambda file: dump([1], file), step=2, attempt="1.0", info={})
    with pytest.raises(CheckpointError, match="holds a list"):
        load_state(store, listed)
