"""All that is explored: each space is a protocol in a place, and its cases have numbers."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from tests.explorer.disk import Crash, Image, crashes
from tests.explorer.invariants import Broken
from tests.explorer.remote import Disturbed, Place, TwoOwners, a_folder
from tests.explorer.runs import LocalRun
from tests.explorer.tools import Act, Tool, ToolOnDisk, copy_all, prune_all
from tests.explorer.turns import History

Kind = Literal["crash", "death", "lost answer", "two owners"]


class Case(NamedTuple):
    """Something that happens.

    Args:
        kind: of event.
        where: in words.
        check: raises `Broken` where something does not hold then.
    """

    kind: Kind
    where: str
    check: Callable[[], Any]


@dataclass(frozen=True)
class Space:
    """A protocol in a place, and how its cases are found.

    Args:
        protocol: in words, for the table.
        place: in words.
        find: given a folder, returns the cases in it; they share the folder, so they are tried one after the other.
        stride: every so many cases are tried in `make test`, all of them in `make test-long`.
    """

    protocol: str
    place: str
    find: Callable[[str], Sequence[Case]] = field(repr=False)
    stride: int = 1

    @property
    def name(self) -> str:
        return f"{self.protocol}, {self.place}"

    @contextmanager
    def cases(self) -> Iterator[Sequence[Case]]:
        """Give the cases; their numbers are the same every time."""
        folder = a_folder()
        try:
            yield self.find(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Explored:
    """Result of an exploration: how many cases were tried, by their kind, and which broke an invariant."""

    counts: dict[Kind, int] = field(default_factory=dict)
    broken: dict[int, str] = field(default_factory=dict)


def explore(space: Space, stride: int = 1, offset: int = 0, until_broken: bool = False) -> Explored:
    """Try every case of a space, or one in `stride`, beginning with number `offset`."""
    found = Explored()
    with space.cases() as cases:
        for number in range(offset, len(cases), stride):
            case = cases[number]
            found.counts[case.kind] = found.counts.get(case.kind, 0) + 1
            try:
                case.check()
            except Broken as error:
                found.broken[number] = f"{case.where}: {error}"
                if until_broken:
                    break
    return found


def _runs(root: str) -> Sequence[Case]:
    run = LocalRun(root)
    return [
        Case("crash", where(crash), functools.partial(run.check, crash))
        for crash in crashes(run.record(Image()))
    ]


def _resumes(root: str) -> Sequence[Case]:
    """Resume what a crash has left at eight moments of a run, and crash in each resume."""
    run = LocalRun(root)
    states = crashes(run.record(Image()))
    begins = [states[len(states) * part // 9] for part in range(1, 9)]
    return [
        Case("crash", where(crash), functools.partial(run.check, crash, begin.model == "killed"))
        for begin in begins
        for crash in crashes(run.record(begin.image), begin.image)
    ]


def _on_disk(act: Act) -> Callable[[str], Sequence[Case]]:
    def find(root: str) -> Sequence[Case]:
        tool = ToolOnDisk(root, act)
        states = crashes(tool.record(), tool.begin)
        return [Case("crash", where(crash), functools.partial(tool.check, crash)) for crash in states]

    return find


def where(crash: Crash) -> str:
    """Return in words where a crash was."""
    return f"after operation {crash.after} ({crash.model})"


def _disturbed(place: Place) -> Callable[[str], Sequence[Case]]:
    def find(folder: str) -> Sequence[Case]:
        run = Disturbed(folder, place)
        cases = []
        for number, step in enumerate(run.steps):
            killed, lost = History(killed=(("first", number),)), History(lost=("first", number))
            for machine in ("one", "two"):
                what = f"before step {number} ({step}), resumed on machine {machine}"
                cases.append(Case("death", what, functools.partial(run.check, killed, machine)))
            if _is_request(step):
                what = f"the answer to step {number} ({step})"
                cases.append(Case("lost answer", what, functools.partial(run.check, lost, "one")))
        return cases

    return find


def _moved(place: Place, stride: int) -> Callable[[str], Sequence[Case]]:
    """Kill a run anywhere, kill its resume on another machine at every `stride`th step, and resume it on the first."""

    def find(folder: str) -> Sequence[Case]:
        run = Disturbed(folder, place)
        [most_steps] = run.check(History(killed=(("first", len(run.steps) // 3),)), "two")
        cases = []
        for first, step in enumerate(run.steps):
            for second in range(first % stride, most_steps, stride):
                what = f"before step {first} ({step}), and the other before its step {second}"
                history = History(killed=(("first", first), ("second", second)))
                cases.append(Case("death", what, functools.partial(run.check, history, "two", "one")))
        return cases

    return find


def _owners(place: Place, stride: int) -> Callable[[str], Sequence[Case]]:
    """Pause the first owner anywhere, and wake it up at every `stride`th step of the second."""

    def find(folder: str) -> Sequence[Case]:
        run = TwoOwners(folder, place)
        cases = []
        for paused, step in enumerate(run.steps):
            what = f"paused before step {paused} ({step})"
            for woken in [*range(paused % stride, run.most_steps, stride), run.most_steps]:
                check = functools.partial(run.check, paused, woken)
                cases.append(Case("two owners", f"{what}, woken before the other's step {woken}", check))
            if place != "disk" and paused and _is_request(run.steps[paused - 1]):
                check = functools.partial(run.check, paused, run.most_steps, paused - 1)
                cases.append(Case("two owners", f"{what}, an answer lost", check))
        return cases

    return find


def _tool(place: Place, target: Place, act: Act) -> Callable[[str], Sequence[Case]]:
    def find(folder: str) -> Sequence[Case]:
        tool = Tool(folder, place, target, act)
        cases = []
        for number, step in enumerate(tool.steps):
            killed, lost = History(killed=(("first", number),)), History(lost=("first", number))
            what = f"before step {number} ({step})"
            cases.append(Case("death", what, functools.partial(tool.check, killed)))
            if _is_request(step):
                what = f"the answer to step {number} ({step})"
                cases.append(Case("lost answer", what, functools.partial(tool.check, lost)))
        return cases

    return find


def _is_request(step: str) -> bool:
    return step.split(" ")[0].isupper()


_STORES: tuple[tuple[Place, str], ...] = (("s3", "S3"), ("gcs", "GCS"))

SPACES = [
    Space("run", "disk", _runs, 7),
    Space("resume", "disk", _resumes, 170),
    Space("prune", "disk", _on_disk(prune_all)),
    Space("copy", "disk", _on_disk(copy_all), 12),
    Space("two owners", "shared disk", _owners("disk", 8), 160),
    *(
        space
        for place, words in _STORES
        for space in (
            Space("run and mirror", words, _disturbed(place), 100),
            Space("run on two machines in turn", words, _moved(place, 140), 120),
            Space("two owners", words, _owners(place, 8), 200),
            Space("prune", words, _tool(place, place, prune_all), 20),
            Space("push", words, _tool("disk", place, copy_all), 40),
            Space("pull", words, _tool(place, "disk", copy_all), 40),
        )
    ),
]
