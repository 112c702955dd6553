"""Which device a rank takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from danling_core.errors import ConfigError
from danling_core.parallel.distributed import resolve_device


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    return monkeypatch


def ranks_of(wanted: str, monkeypatch: pytest.MonkeyPatch, local: int, world: int) -> list[str]:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    found = []
    for rank in range(local):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found.append(str(resolve_device(wanted)))
    return found


@pytest.mark.holds("bugs-10")
def test_with_more_ranks_than_gpus_auto_puts_all_of_them_on_the_cpu(one_gpu: Any, caplog: Any) -> None:
    assert ranks_of("auto", one_gpu, 1, 1) == ["cuda:0"]
    assert ranks_of("auto", one_gpu, 2, 2) == ["cpu", "cpu"]
    assert "2 ranks on this node and 1 GPU(s)" in caplog.text


def test_with_more_ranks_than_gpus_cuda_is_refused_on_every_rank(one_gpu: Any) -> None:
    with pytest.raises(ConfigError, match="lower nproc_per_node"):
        ranks_of("cuda", one_gpu, 2, 2)


def test_a_node_with_too_few_gpus_is_refused_where_other_nodes_may_have_enough(one_gpu: Any) -> None:
    with pytest.raises(ConfigError, match="2 ranks on this node and 1 GPU"):
        ranks_of("auto", one_gpu, 2, 4)
