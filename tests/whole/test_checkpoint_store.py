"""Real processes for what tests/unit/test_checkpoint_store.py tries without them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from danling_core.checkpoints import CheckpointStore
from tests.unit.test_checkpoint_store import assert_nothing_is_left, put

ROOT = Path(__file__).parents[2]


def test_a_file_size_limit_of_the_system_is_a_clear_error(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys\n"
        "from danling_core.checkpoints import CheckpointStore\n"
        "from danling_core.errors import CheckpointError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "store = CheckpointStore(sys.argv[1])\n"
        "def commit(step, size):\n"
        "    store.commit(lambda file: file.write(bytes(size)), step=step, attempt='1.0', info={})\n"
        "commit(1, 1000)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    commit(2, 1_000_000)\n"
        "except CheckpointError as error:\n"
        "    sys.exit(0 if 'File too large' in str(error) else 'vague: ' + str(error))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=ROOT, timeout=60)
    store = CheckpointStore(str(tmp_path))
    assert_nothing_is_left(store, *store.records())
    assert [record.step for record in store.records()] == [1]


CRASH_POINTS = ("mkdir", "fsync", "replace")


def commit_and_die_at(url: str, point: int) -> None:
    """In a child of its own: commit, and be killed before the `point`-th call that changes the disk."""
    calls = iter(range(1, 1000))

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for name in CRASH_POINTS:
        setattr(os, name, dying(getattr(os, name)))
    put(CheckpointStore(url), 2, "latest", "best")


def test_a_kill_before_any_call_leaves_a_whole_checkpoint_or_none(tmp_path: Path) -> None:
    outcomes = []
    for point in range(1, 100):
        url = str(tmp_path / str(point))
        first = put(CheckpointStore(url), 1, "latest", "best")
        child = os.fork()
        if child == 0:
            try:
                commit_and_die_at(url, point)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        reader = CheckpointStore(url)
        newest, bad = reader.newest_good()
        assert newest is not None and bad == []
        assert reader.pointed("latest") == reader.pointed("best") == newest, "pointers move with the record"
        if newest != first:
            assert newest.step == 2
        outcomes.append(newest.step)
        if not os.WIFSIGNALED(status):
            break
        put(reader, 3, "latest")
    assert outcomes == sorted(outcomes) and outcomes[0] == 1 and outcomes[-1] == 2
    assert outcomes.count(1) >= 5 and outcomes.count(2) >= 5, outcomes


COMMIT_FOREVER = """
import random, sys
from danling_core.checkpoints import CheckpointStore
url, seed = sys.argv[1], int(sys.argv[2])
store, rng = CheckpointStore(url), random.Random(seed)
step = max((record.step for record in store.records()), default=0)
while True:
    step += 1
    chunks = [rng.randbytes(rng.randrange(1, 50_000)) for _ in range(20)]
    names = ("latest", "best") if step % 3 == 0 else ("latest",)
    write = lambda file: [file.write(chunk) for chunk in chunks]
    store.commit(write, step=step, attempt=f"{seed}.0", info={}, names=names)
    print(step, flush=True)
    store.prune(keep_last=2)
"""


def kill_at_a_random_moment(url: str, seed: int, rng: random.Random) -> int:
    """Let a writer commit a few times, kill it, and return the last step that it said was committed."""
    arguments = [sys.executable, "-c", COMMIT_FOREVER, url, str(seed)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=ROOT) as writer:
        assert writer.stdout is not None
        said = 0
        for _ in range(rng.randrange(1, 6)):
            said = int(writer.stdout.readline())
        for _ in range(rng.randrange(200_000)):
            pass  # somewhere inside the next commit or prune
        writer.kill()
        for line in writer.stdout:
            said = int(line) if line.endswith("\n") else said
    return said


def storm(url: str, kills: int) -> None:
    rng = random.Random(0)
    for seed in range(1, kills + 1):
        said = kill_at_a_random_moment(url, seed, rng)
        reader = CheckpointStore(url)
        records, bad = reader.survey()
        assert bad == []
        for record in records:
            reader.verify(record)
        assert records[0].step >= said, "what was said to be committed is there"
        assert reader.pointed("latest") == records[0]
        assert (reader.pointed("best") is None) == (records[0].step < 3)


def test_a_writer_killed_at_random_moments_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    storm(str(tmp_path / "checkpoints"), kills=6)


@pytest.mark.long
def test_a_long_storm_of_kills_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    storm(str(tmp_path / "checkpoints"), kills=60)
