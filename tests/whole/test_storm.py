"""SIGKILL at random moments to random processes of a run: nothing is lost, and the bits stay the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from danling_core.config import Config
from danling_core.launch.client import Launcher
from danling_core.process_tree import start_time
from danling_core.runs.folder import RunFolder
from tests.processes import tree
from tests.whole_runs import ROOT, Ended, config, launch

LIKELY = {"driver": 2, "launcher": 2, "fork server": 1, "rank": 6}


class Storm:
    """Keeps one run going by starting drivers, and kills processes of their trees.

    Args:
        wanted: the run's config.
        seed: of the moments and the victims.
    """

    def __init__(self, wanted: Config, folder: Path, seed: int) -> None:
        self._likely = LIKELY | ({"loader worker": 2} if wanted.dataloader.num_workers else {})
        self.killed: Counter[str] = Counter()
        self.while_saving = 0
        self._wanted = wanted
        self._random = random.Random(seed)
        self._config_path = folder / "wanted.yaml"
        self._config_path.write_text(wanted.yamls())
        self._log_path = folder / "drivers.log"

    def blow(self, kills: int) -> Path:
        """Kill so many, unless the run is complete before; then see it to its end. Returns its folder."""
        drivers = 0
        while True:
            drivers += 1
            assert drivers < kills + 10, f"the run does not end:\n{self._log_path.read_text()[-3000:]}"
            with self._driver() as driver:
                while sum(self.killed.values()) < kills and driver.poll() is None:
                    self._strike(driver)
                if driver.wait(100) == 0:
                    return self._folder()

    @contextmanager
    def _driver(self) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "tests.storm_driver", str(self._config_path)]
        with self._log_path.open("ab") as log:
            driver = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            yield driver
        finally:
            driver.kill()
            driver.wait()

    def _strike(self, driver: subprocess.Popen[bytes]) -> None:
        """Kill somebody: in the middle of a save, or some time after there is one of the chosen kind."""
        kind = self._random.choices(list(self._likely), list(self._likely.values()))[0]
        wants_save, delay = self._random.random() < 0.5, self._random.uniform(0.0, 2.0)
        if not self._wait(driver, lambda: bool(self._victims(driver, kind)), 20.0):
            return
        if wants_save:
            self._wait(driver, self._is_saving, 10.0)
        else:
            self._wait(driver, lambda: False, delay)
        victims = self._victims(driver, kind)
        if victims and driver.poll() is None and _kill(self._random.choice(victims)):
            self.killed[kind] += 1
            self.while_saving += self._is_saving()

    def _wait(self, driver: subprocess.Popen[bytes], is_time: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while driver.poll() is None and time.monotonic() < end:
            if is_time():
                return True
            time.sleep(0.002)
        return False

    def _victims(self, driver: subprocess.Popen[bytes], kind: str) -> list[int]:
        living = [pid for found, pid in tree(driver.pid) if found == kind]
        return [pid for pid in living if start_time(pid) is not None]

    def _is_saving(self) -> bool:
        """Whether there is a payload that has no record yet, and may never get one."""
        for folder in Path(self._wanted.project_root).glob("*/*/checkpoints"):
            committed = {path.stem for path in (folder / "records").glob("*.json")}
            now = time.time()
            for path in (folder / "data").glob("*"):
                if path.name not in committed and now - _modified(path) < 0.5:
                    return True
        return False

    def _folder(self) -> Path:
        (status,) = Path(self._wanted.project_root).glob("*/*/status.json")
        return status.parent


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


@contextmanager
def reader(root: Path) -> Iterator[dict[str, Any]]:
    """Somebody who reads all checkpoints all the time; what was seen is there after the block."""
    command = [sys.executable, "-m", "tests.storm_reader", str(root)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    seen: dict[str, Any] = {}
    try:
        yield seen
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        seen.update(json.loads(out))
    finally:
        process.kill()
        process.wait()


def stormy(root: Path, **fields: Any) -> Config:
    """A run of some seconds, with saves that take a moment."""
    params = {"width": 20000, "batch_norm": True, "step_seconds": 0.03}
    return config(
        root, **{"params": params, "ema_decay": 0.9, "max_restarts": 20, "stop_grace_seconds": 5.0, **fields}
    )


def weather(
    launcher: Launcher, root: Path, kills: int, seed: int, **fields: Any
) -> tuple[Storm, dict[str, Any]]:
    """One run in a storm, compared with the same one in peace."""
    peace = launch(launcher, stormy(root / "peace", **fields))
    storm_root = root / "storm"
    storm_root.mkdir()
    with reader(storm_root) as seen:
        storm = Storm(stormy(storm_root, **fields), root, seed)
        path = storm.blow(kills)
    Ended(path, None).must_equal(peace)
    status = RunFolder(str(path)).read_status()
    assert status is not None and status.is_complete and status.bitwise
    assert seen["torn"] == [] and seen["whole"] > 0
    return storm, seen


WORLDS: dict[int, dict[str, Any]] = {
    1: {"dataloader": {"batch_size": 8}, "accum_steps": 2},
    2: {"dataloader": {"batch_size": 4, "num_workers": 1}},
    3: {"dataloader": {"batch_size": 4}},
    4: {"dataloader": {"batch_size": 4}},
}


@pytest.mark.long
@pytest.mark.holds("system-7")
@pytest.mark.timeout(300)
def test_a_short_storm(launcher: Launcher, tmp_path: Path) -> None:
    rage(launcher, tmp_path, kills=5, seed=4, epoch_end=6)


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("world_size", WORLDS)
def test_a_long_storm(launcher: Launcher, tmp_path: Path, world_size: int) -> None:
    """14 kills in each of the four worlds."""
    fields = {"epoch_end": 20, "save_interval_steps": 2, **WORLDS[world_size]}
    rage(launcher, tmp_path, 14, 100 * world_size, nproc_per_node=world_size, **fields)


def rage(launcher: Launcher, folder: Path, kills: int, seed: int, **fields: Any) -> None:
    """So many kills, over as many runs as that takes: a run may be complete before they are all struck."""
    killed: Counter[str] = Counter()
    while_saving = looks = 0
    for round_number in range(kills):
        left = kills - sum(killed.values())
        if left == 0:
            break
        root = folder / str(round_number)
        root.mkdir()
        storm, seen = weather(launcher, root, left, seed + round_number, **fields)
        killed += storm.killed
        while_saving += storm.while_saving
        looks += seen["whole"]
    assert sum(killed.values()) == kills
    print(f"{dict(killed)}, {while_saving} while saving, {looks} checkpoints read whole")
