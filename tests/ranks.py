"""Gloo ranks that stay: started once, they run the functions of many tests."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT_SECONDS = 60


class Ranks:
    """A process group of `world_size` processes. Functions and what they take and return are pickled."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._meeting_place: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, **named: Any) -> list[Any]:
        """Call a module-level function on every rank; returns what they return, by rank. Raises RankFailed."""
        if not self._processes:
            self._start()
        message = pickle.dumps(functools.partial(function, *args, **named))
        for rank, pipe in enumerate(self._pipes):
            with self._told_if_it_died(rank):
                pipe.send_bytes(message)
        answers: list[Any] = [None] * self.world_size
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            ready = wait(list(waiting), TIMEOUT_SECONDS)
            if not ready:
                self.close()
                raise TimeoutError(f"ranks {sorted(waiting.values())} did not answer: {function}")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                with self._told_if_it_died(rank):
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                if isinstance(answers[rank], _Failure):  # others may wait for it in a collective, for ever
                    self.close()
                    raise RankFailed(f"rank {rank} failed:\n{answers[rank].text}")
        return answers

    def close(self) -> None:
        """End the processes; the next `run` starts others."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._meeting_place is not None:
            self._meeting_place.cleanup()
            self._meeting_place = None

    @contextmanager
    def _told_if_it_died(self, rank: int) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            process = self._processes[rank]
            process.join(TIMEOUT_SECONDS)
            self.close()
            raise RankFailed(f"rank {rank} ended with {process.exitcode} and gave no answer") from error

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch._dynamo", "tests.small_runner"])
        self._meeting_place = tempfile.TemporaryDirectory(prefix="ranks-")
        store = os.path.join(self._meeting_place.name, "store")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


class RankFailed(AssertionError):
    """A rank raised, and the message has its traceback; or it died."""


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        try:
            answer = pickle.dumps(pickle.loads(message)())
        except BaseException:
            answer = pickle.dumps(_Failure(traceback.format_exc()))
        pipe.send_bytes(answer)


@contextmanager
def ranks(world_size: int) -> Iterator[Ranks]:
    """Ranks that end with the block."""
    group = Ranks(world_size)
    try:
        yield group
    finally:
        group.close()
