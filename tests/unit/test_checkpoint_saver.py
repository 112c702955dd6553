"""The background saver: a snapshot that nothing changes, bounded memory, and failures that surface."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
import torch

from danling_core.checkpoints import BackgroundSaver, CheckpointStore, Record, load_state
from danling_core.errors import CheckpointError, Fenced, StoreUnavailable


class GatedStore(CheckpointStore):
    """A real store whose writer waits at a gate, and fails with what the test put into `failures`."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Semaphore(0)
        self.failures: list[BaseException] = []
        self.tries = 0
        self.held: dict[int, threading.Event] = {}

    def publish(self, *arguments: Any, **options: Any) -> Record:
        self.tries += 1
        self.arrived.release()
        assert self.gate.wait(60)
        if options["step"] in self.held:
            assert self.held[options["step"]].wait(60)
        if self.failures:
            raise self.failures.pop(0)
        return super().publish(*arguments, **options)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[GatedStore]:
    store = GatedStore(str(tmp_path))
    yield store
    store.gate.set()


@pytest.fixture
def saver(store: GatedStore) -> Iterator[BackgroundSaver]:
    saver = BackgroundSaver(store, retry_pause_seconds=0)
    yield saver
    store.gate.set()
    store.failures.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "_failure", None)
        saver.close()


def save(saver: BackgroundSaver, step: int, *names: str, required: bool = False) -> bool:
    state = {"x": torch.full((1000,), float(step))}
    return saver.save(state, step=step, attempt="1.0", info={}, names=names or ("latest",), required=required)


def addresses_of(saver: BackgroundSaver) -> set[int]:
    """Where the staging buffers lie."""
    pools = [staging._buffers.values() for staging in saver._free]
    return {buffer.data_ptr() for pool in pools for buffers in pool for buffer in buffers}


def disk_error(code: int) -> CheckpointError:
    error = CheckpointError("cannot save")
    error.__cause__ = OSError(code, "injected")
    return error


def test_what_is_saved_is_the_state_at_the_call_and_comes_back_whole(
    saver: BackgroundSaver, store: GatedStore
) -> None:
    model = torch.nn.Linear(3, 3)
    nested: dict[str, Any] = {
        "model": model.state_dict(),
        "history": {0: {"val": {"loss": 0.5}}},
        "list": [1],
    }
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    store.gate.clear()
    saver.save(nested, step=1, attempt="1.0", info={"score": 0.5}, names=("latest", "best"))
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    nested["history"][0]["val"]["loss"] = 9.0
    nested["list"].append(2)
    store.gate.set()
    saver.drain()
    record = store.pointed("best")
    assert record is not None and record == store.pointed("latest") and record.score == 0.5
    state = load_state(store, record)
    for name, tensor in before.items():
        assert torch.equal(state["model"][name], tensor)
    assert state["history"] == {0: {"val": {"loss": 0.5}}} and state["list"] == [1]


def test_buffers_are_reused_and_memory_is_bounded_to_two_states(
    saver: BackgroundSaver, store: GatedStore
) -> None:
    size = 1000 * 4
    for step in range(5):
        save(saver, step)
        saver.drain()
    assert saver.staging_bytes == size, "one set of buffers while saving keeps up"
    addresses = addresses_of(saver)
    save(saver, 5)
    saver.drain()
    assert addresses_of(saver) == addresses
    store.gate.clear()
    save(saver, 6)
    with saver._changed:
        assert saver._changed.wait_for(lambda: saver._is_writing, timeout=60)
    for step in range(7, 20):
        save(saver, step)
    store.gate.set()
    saver.drain()
    assert saver.staging_bytes == 2 * size


def test_buffers_follow_a_state_that_changes_its_shape(saver: BackgroundSaver, store: GatedStore) -> None:
    for step, shape in enumerate([(10,), (20, 2), (5,), (5,)]):
        saver.save({"x": torch.ones(shape), "y": [torch.ones(step)]}, step=step, attempt="1.0", info={})
        saver.drain()
        state = load_state(store, store.records()[0])
        assert state["x"].shape == shape and state["y"][0].shape == (step,)
    assert saver.staging_bytes == (5 + 3) * 4


def test_the_newest_periodic_save_wins_while_one_is_written(
    saver: BackgroundSaver, store: GatedStore
) -> None:
    store.gate.clear()
    save(saver, 1)
    assert store.arrived.acquire(timeout=60)
    assert all(save(saver, step) for step in (2, 3, 4))
    store.gate.set()
    saver.drain()
    assert [record.step for record in store.records()] == [4, 1] and saver.superseded == 2
    assert load_state(store, store.records()[0])["x"][0] == 4


@pytest.mark.parametrize(
    "names, required", [(("latest",), True), (("latest", "best"), False), (("epoch-3",), False)]
)
def test_a_required_save_is_never_given_up(
    saver: BackgroundSaver, store: GatedStore, names: tuple[str, ...], required: bool
) -> None:
    store.gate.clear()
    save(saver, 1)
    assert store.arrived.acquire(timeout=60)
    assert save(saver, 2, *names, required=required)
    assert not save(saver, 3), "a periodic one steps back"
    store.gate.set()
    saver.drain()
    assert [record.step for record in store.records()] == [2, 1]
    assert save(saver, 4)


def test_a_required_save_takes_the_place_of_a_waiting_periodic_one(
    saver: BackgroundSaver, store: GatedStore
) -> None:
    store.gate.clear()
    save(saver, 1)
    assert store.arrived.acquire(timeout=60)
    save(saver, 2)
    save(saver, 3, "latest", "best")
    store.gate.set()
    saver.drain()
    assert [record.step for record in store.records()] == [3, 1]


def test_a_required_save_waits_only_until_the_pending_one_is_begun(
    saver: BackgroundSaver, store: GatedStore
) -> None:
    store.held = {1: threading.Event(), 2: threading.Event()}
    save(saver, 1)
    assert store.arrived.acquire(timeout=60)
    save(saver, 2, required=True)
    third = threading.Thread(target=save, args=(saver, 3), kwargs={"required": True})
    third.start()
    store.held[1].set()
    third.join(30)
    is_waiting = third.is_alive()
    store.held[2].set()
    third.join()
    assert not is_waiting, "it waited until the second was written"


def test_required_saves_wait_for_their_turn_and_all_are_written(
    saver: BackgroundSaver, store: GatedStore
) -> None:
    for step in range(1, 8):
        assert save(saver, step, required=True)
    saver.drain()
    assert [record.step for record in store.records()] == [7, 6, 5, 4, 3, 2, 1]


def test_a_passing_fault_is_retried_once(saver: BackgroundSaver, store: GatedStore) -> None:
    store.failures = [disk_error(errno.EIO)]
    save(saver, 1)
    saver.drain()
    assert store.tries == 2 and store.records()[0].step == 1
    store.failures = [StoreUnavailable("gone"), StoreUnavailable("still gone")]
    save(saver, 2)
    with pytest.raises(StoreUnavailable, match="still gone"):
        saver.drain()
    assert store.tries == 4 and [record.step for record in store.records()] == [1]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_fault_that_stays_is_not_retried_and_surfaces_once(
    saver: BackgroundSaver, store: GatedStore, code: int
) -> None:
    save(saver, 1)
    saver.drain()
    store.failures = [disk_error(code)]
    save(saver, 2)
    with pytest.raises(CheckpointError, match="cannot save"):
        saver.drain()
    assert store.tries == 2
    saver.check()
    assert store.newest_good() == (store.records()[0], [])
    latest = store.pointed("latest")
    assert latest is not None and latest.step == 1
    save(saver, 3)
    saver.drain()
    assert store.records()[0].step == 3


def test_a_failure_is_raised_by_check_and_by_the_next_save(saver: BackgroundSaver, store: GatedStore) -> None:
    for ask in (saver.check, lambda: save(saver, 9)):
        store.failures = [disk_error(errno.ENOSPC)]
        save(saver, 1)
        with saver._changed:
            assert saver._changed.wait_for(lambda: saver._failure is not None, timeout=60)
        with pytest.raises(CheckpointError, match="cannot save"):
            ask()


def test_a_real_full_disk_surfaces_with_the_bytes_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from danling_core.storage import hashing

    class FullFile:
        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, data: memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    writer = hashing.HashingWriter
    store = CheckpointStore(str(tmp_path))
    with BackgroundSaver(store) as saver:
        save(saver, 1)
        saver.drain()
        monkeypatch.setattr(hashing, "HashingWriter", lambda file: writer(cast(BinaryIO, FullFile(file))))
        save(saver, 2)
        with pytest.raises(CheckpointError, match=r"needs 4,000 bytes, [\d,]+ are free"):
            saver.drain()
    assert [record.step for record in store.records()] == [1]
    assert [path.name for path in (tmp_path / "data").iterdir()] == [store.records()[0].name]


def test_on_commit_runs_in_the_background_after_the_commit_and_its_failure_surfaces(
    store: GatedStore,
) -> None:
    seen: list[tuple[str, tuple[str, ...], bool]] = []

    def on_commit(record: Record, names: tuple[str, ...]) -> None:
        is_listed = store.pointed("latest") == record
        seen.append((threading.current_thread().name, names, is_listed))
        store.prune(keep_last=1)
        if record.step == 3:
            raise ValueError("the event log is gone")

    with BackgroundSaver(store, on_commit) as saver:
        save(saver, 1)
        save(saver, 2, "latest", "best")
        saver.drain()
        assert seen[-1] == ("checkpoint-saver", ("latest", "best"), True)
        assert [record.step for record in store.records()] == [2]
        save(saver, 3)
        with pytest.raises(CheckpointError, match="step 3.*event log is gone"):
            saver.drain()


def test_errors_of_our_own_keep_their_type(saver: BackgroundSaver, store: GatedStore) -> None:
    store.failures = [Fenced("another process owns this run")]
    save(saver, 1)
    with pytest.raises(Fenced):
        saver.drain()


def test_a_state_that_cannot_be_saved_is_refused_at_the_call_and_harms_nothing(
    saver: BackgroundSaver, store: GatedStore
) -> None:
    store.gate.clear()
    save(saver, 1)
    assert store.arrived.acquire(timeout=60)
    save(saver, 2)
    with pytest.raises(CheckpointError, match=r"state\['x'\] is a object"):
        saver.save({"x": object()}, step=3, attempt="1.0", info={})
    store.gate.set()
    saver.drain()
    assert [record.step for record in store.records()] == [2, 1]


def test_close_writes_what_was_accepted_and_then_refuses(store: GatedStore) -> None:
    saver = BackgroundSaver(store)
    save(saver, 1)
    save(saver, 2, required=True)
    saver.close()
    saver.close()
    assert store.records()[0].step == 2 and saver.staging_bytes == 0
    with pytest.raises(CheckpointError, match="closed"):
        save(saver, 3)


def test_an_error_of_the_loop_is_not_hidden_by_one_of_the_saver(store: GatedStore) -> None:
    store.failures = [disk_error(errno.ENOSPC)]
    with pytest.raises(ZeroDivisionError) as caught, BackgroundSaver(store) as saver:
        save(saver, 1)
        raise ZeroDivisionError("user code")
    assert "cannot save" in caught.value.__notes__[0]


def test_tied_weights_are_staged_once(saver: BackgroundSaver, store: GatedStore) -> None:
    weight = torch.randn(100)
    saver.save(
        {"a": weight, "b": weight.detach(), "c": torch.randn(1000)[:10]}, step=1, attempt="1.0", info={}
    )
    saver.drain()
    assert saver.staging_bytes == 110 * 4
    state = load_state(store, store.records()[0])
    assert state["a"].data_ptr() == state["b"].data_ptr() and torch.equal(state["a"], weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_state_is_copied_before_the_next_kernel_changes_it(
    saver: BackgroundSaver, store: GatedStore
) -> None:
    tensor = torch.ones(50_000_000, device="cuda")
    for step in range(3):
        tensor.fill_(step)
        saver.save({"x": tensor}, step=step, attempt="1.0", info={}, required=True)
        tensor.fill_(-1)
    saver.drain()
    for record in store.records():
        state = load_state(store, record)
        assert state["x"].device.type == "cpu" and bool((state["x"] == record.step).all())
