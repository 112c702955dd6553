"""Private names of other libraries that we use: where an upgrade changes one, a test here says who needs it."""

from __future__ import annotations

import inspect
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, get_worker_info

LOST = "an upgrade took away what {} uses"


def test_torch_tells_whether_the_cpu_computes_in_bf16() -> None:
    told = torch.ops.mkldnn._is_mkldnn_bf16_supported(), torch.cpu._is_avx512_bf16_supported()
    assert all(isinstance(each, bool) for each in told), LOST.format("optim/precision.py")


def test_a_gradient_scaler_keeps_what_it_found_by_device() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), torch.amp.GradScaler("cpu")
    scaler.scale((weight * torch.tensor([1.0, float("inf")])).sum()).backward()
    scaler.unscale_(optimizer)
    found = scaler._found_inf_per_device(optimizer)
    assert [float(value) for value in found.values()] == [1.0], LOST.format("train/stepper.py")


def test_the_average_of_weights_is_one_call() -> None:
    mine = [torch.zeros(2)]
    torch._foreach_lerp_(mine, [torch.ones(2)], 0.25)
    assert mine[0].tolist() == [0.25, 0.25], LOST.format("optim/averages.py")


def test_a_compiled_module_shows_the_one_inside() -> None:
    module = nn.Linear(1, 1)
    compiled: nn.Module = torch.compile(module)  # type: ignore[assignment]
    assert compiled._orig_mod is module, LOST.format("parallel/strategies.py")


def test_tensorboard_names_its_files_by_the_clock_of_one_module() -> None:
    from tensorboard.summary.writer import event_file_writer

    assert event_file_writer.time is time, LOST.format("writers/tensorboard.py")
    assert "time.time()" in inspect.getsource(event_file_writer.EventFileWriter.__init__)


def test_a_loader_keeps_its_workers_in_one_attribute() -> None:
    assert DataLoader([0])._iterator is None, LOST.format("data/splits.py")


def test_a_process_leaves_its_group_by_one_call() -> None:
    from torch.distributed import distributed_c10d

    from danling_core.runner.aside import NO_GROUP

    assert list(inspect.signature(distributed_c10d._update_default_pg).parameters) == ["pg"], LOST.format(
        "runner/aside.py"
    )
    with pytest.raises(ValueError, match=NO_GROUP):
        torch.distributed.all_reduce(torch.zeros(1))


def test_the_worker_info_is_one_variable() -> None:
    worker = import_module("torch.utils.data._utils.worker")
    before, worker._worker_info = worker._worker_info, "told"
    try:
        assert get_worker_info() == "told", LOST.format("data/iterable.py")
    finally:
        worker._worker_info = before


def test_elastic_starts_and_monitors_by_these_methods() -> None:
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    for name in ("_start_workers", "_monitor_workers"):
        parameters = list(inspect.signature(getattr(LocalElasticAgent, name)).parameters)
        assert parameters == ["self", "worker_group"], LOST.format("launch/group.py")


def test_the_checksums_of_torch_save_can_be_turned_off() -> None:
    assert isinstance(torch.serialization.get_crc32_options(), bool), LOST.format("checkpoints/codec.py")
    assert callable(torch.serialization.set_crc32_options)


def test_the_state_of_a_module_has_its_metadata() -> None:
    assert "" in nn.Linear(1, 1).state_dict()._metadata, LOST.format("checkpoints/plain.py")  # type: ignore[attr-defined]


def test_tensorboard_takes_a_summary_of_hyperparameters(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    with SummaryWriter(str(tmp_path)) as writer:
        assert len(hparams({"lr": 0.1}, {"score": 0.0})) == 3, LOST.format("writers/tensorboard.py")
        assert callable(writer.file_writer.add_summary)


def test_what_a_store_repeats_by_itself_can_be_turned_off() -> None:
    gcsfs, s3fs = import_module("gcsfs"), import_module("s3fs")
    request = gcsfs.GCSFileSystem._request
    assert inspect.iscoroutinefunction(request.__wrapped__), LOST.format("storage/remote.py")
    assert s3fs.S3FileSystem.retries >= 1
    assert s3fs.S3FileSystem._strip_protocol("s3://bucket/a") == "bucket/a"


@pytest.mark.parametrize(
    ("module", "name"),
    [("prefect.events.worker", "EventsWorker"), ("prefect.logging.handlers", "APILogWorker")],
)
def test_prefect_drains_what_its_threads_hold(module: str, name: str) -> None:
    drain = getattr(import_module(module), name).drain_all
    assert "at_exit" in inspect.signature(drain).parameters, LOST.format("flows/server.py")


def test_prefect_makes_its_server_by_a_factory() -> None:
    found = find_spec("prefect.server.api.server")  # read, not imported: that would start a process
    assert found is not None and found.origin is not None
    assert "def create_app(" in Path(found.origin).read_text(), LOST.format("flows/server_app.py")


def test_the_fork_server_can_be_started_ahead() -> None:
    assert callable(import_module("multiprocessing.forkserver").ensure_running), LOST.format(
        "launch/serve.py"
    )
