"""How ranks agree on the step before which they stop: on a CPU, on devices that lag, on several nodes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from danling_core.errors import RunInterrupted
from danling_core.parallel.control import Control
from danling_core.parallel.stopping import Stopping

STRIDE = 4


class NotYet(Exception):
    """The host would block here."""


@dataclass
class Devices:
    """Hosts that queue steps ahead of their devices. A device does a step once every host has queued it: that is
    what its reduction waits for."""

    queued: list[int]
    done: list[int]

    def mark(self, rank: int) -> Callable[[], None]:
        point = self.queued[rank]

        def wait() -> None:
            if self.done[rank] < point:
                raise NotYet

        return wait


@dataclass
class Race:
    """Ranks whose hosts and devices run in any order that the rules allow, drawn from `chance`."""

    control: Control
    world_size: int
    chance: random.Random
    asked_at: int | None = None
    stopped_at: dict[int, int] = field(default_factory=dict)

    def run(self, begin: int) -> None:
        """From step `begin` until every rank stopped; a stop is asked for somewhere on the way."""
        devices = Devices([begin] * self.world_size, [begin] * self.world_size)
        ranks = [
            Stopping(
                self.control, is_main=rank == 0, stride=STRIDE, mark=lambda rank=rank: devices.mark(rank)
            )
            for rank in range(self.world_size)
        ]
        eager = [self.chance.random() for _ in ranks]  # some hosts are faster, some devices slower
        while len(self.stopped_at) < self.world_size:
            if self.asked_at is None and self.chance.random() < 0.02:
                self.control.request_stop()
                self.asked_at = devices.queued[0]
            rank = self.chance.randrange(self.world_size)
            if self.chance.random() < eager[rank]:
                self._host(rank, ranks[rank], devices)
            elif devices.done[rank] < min(devices.queued):
                devices.done[rank] += 1

    def _host(self, rank: int, stopping: Stopping, devices: Devices) -> None:
        if rank in self.stopped_at:
            return
        try:
            stopping.check(devices.queued[rank])
        except NotYet:
            return
        except RunInterrupted:
            self.stopped_at[rank] = devices.queued[rank]
            return
        devices.queued[rank] += 1


@pytest.mark.parametrize("seed", range(60))
def test_hosts_ahead_of_their_devices_stop_before_the_same_step(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    with Control.create(str(tmp_path / "control"), 1) as control:
        race = Race(control, world_size=chance.choice([2, 3, 5]), chance=chance)
        race.run(begin=chance.randrange(20))
    [step] = set(race.stopped_at.values())
    assert race.asked_at is not None and race.asked_at < step <= race.asked_at + 2 * STRIDE


def test_a_device_is_never_waited_for_to_the_end(tmp_path: Path) -> None:
    devices = Devices([0], [0])
    with Control.create(str(tmp_path / "control"), 1) as control:
        stopping = Stopping(control, is_main=True, stride=STRIDE, mark=lambda: devices.mark(0))
        for step in range(2 * STRIDE):
            stopping.check(step)
            devices.queued[0] += 1
        with pytest.raises(NotYet):
            stopping.check(2 * STRIDE)
        devices.done[0] = STRIDE
        stopping.check(2 * STRIDE)


def test_on_a_cpu_a_stop_takes_one_step(tmp_path: Path) -> None:
    with Control.create(str(tmp_path / "control"), 2) as control:
        main, other = Stopping(control, is_main=True), Stopping(control, is_main=False)
        main.wish("enough")
        main.check(7)
        other.check(7)
        for each in (main, other):
            with pytest.raises(RunInterrupted, match="stopped before step 8"):
                each.check(8)
