"""All that is explored: each space is a protocol in a place, and its cases have numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from tests.explorer.disk import Image, crashes
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
    return _crashes(run, run.record(Image()), Image())


def _resumes(root: str) -> Sequence[Case]:
    """Resume what a crash has left at eight moments of a run, and crash in each resume."""
    run = LocalRun(root)
    states = crashes(run.record(Image()))
    begins = [states[len(states) * part // 9].image for part in range(1, 9)]
    return [case for begin in begins for case in _crashes(run, run.record(begin), begin)]


def _on_disk(act: Act) -> Callable[[str], Sequence[Case]]:
    def find(root: str) -> Sequence[Case]:
        tool = ToolOnDisk(root, act)
        return _crashes(tool, tool.record(), tool.begin)

    return find


def _crashes(tried: LocalRun | ToolOnDisk, operations: Any, begin: Image) -> list[Case]:
    return [
        Case(
            "crash", f"after operation {crash.after} ({crash.model})", lambda crash=crash: tried.check(crash)
        )  # type: ignore[misc]
        for crash in crashes(operations, begin)
    ]


def _disturbed(place: Place) -> Callable[[str], Sequence[Case]]:
    def find(folder: str) -> Sequence[Case]:
        run = Disturbed(folder, place)
        cases = []
        for number, step in enumerate(run.steps):
            killed, lost = History(killed=("first", number)), History(lost=("first", number))
            for machine in ("one", "two"):
                where = f"before step {number} ({step}), resumed on machine {machine}"
                cases.append(Case("death", where, lambda h=killed, m=machine: run.check(h, m)))  # type: ignore[misc]
            if _is_request(step):
                where = f"the answer to step {number} ({step})"
                cases.append(Case("lost answer", where, lambda h=lost: run.check(h, "one")))  # type: ignore[misc]
        return cases

    return find


def _owners(place: Place, stride: int) -> Callable[[str], Sequence[Case]]:
    """Pause the first owner anywhere, and wake it up at every `stride`th step of the second."""

    def find(folder: str) -> Sequence[Case]:
        run = TwoOwners(folder, place)
        cases = []
        for paused in range(len(run.steps)):
            for woken in [*range(paused % stride, run.most_steps, stride), run.most_steps]:
                where = f"paused before step {paused} ({run.steps[paused]}), woken before the other's step {woken}"
                cases.append(Case("two owners", where, lambda p=paused, w=woken: run.check(p, w)))  # type: ignore[misc]
                if (
                    place != "disk"
                    and paused
                    and _is_request(run.steps[paused - 1])
                    and woken == run.most_steps
                ):
                    cases.append(
                        Case(
                            "two owners",
                            f"{where}, an answer lost",
                            lambda p=paused, w=woken: run.check(p, w, p - 1),
                        )  # type: ignore[misc]
                    )
        return cases

    return find


def _tool(place: Place, target: Place, act: Act) -> Callable[[str], Sequence[Case]]:
    def find(folder: str) -> Sequence[Case]:
        tool = Tool(folder, place, target, act)
        cases = []
        for number, step in enumerate(tool.steps):
            killed, lost = History(killed=("first", number)), History(lost=("first", number))
            cases.append(Case("death", f"before step {number} ({step})", lambda h=killed: tool.check(h)))  # type: ignore[misc]
            if _is_request(step):
                cases.append(Case("lost answer", f"to step {number} ({step})", lambda h=lost: tool.check(h)))  # type: ignore[misc]
        return cases

    return find


def _is_request(step: str) -> bool:
    return step.split(" ")[0].isupper()


SPACES = [
    Space("run", "disk", _runs, 2),
    Space("resume", "disk", _resumes, 60),
    Space("prune", "disk", _on_disk(prune_all)),
    Space("copy", "disk", _on_disk(copy_all), 6),
    Space("two owners", "shared disk", _owners("disk", 8), 45),
    *(
        space
        for place, words in (("s3", "S3"), ("gcs", "GCS"))
        for space in (
            Space("run and mirror", words, _disturbed(place), 48),  # type: ignore[arg-type]
            Space("two owners", words, _owners(place, 8), 60),  # type: ignore[arg-type]
            Space("prune", words, _tool(place, place, prune_all), 12),  # type: ignore[arg-type]
            Space("push", words, _tool("disk", place, copy_all), 24),  # type: ignore[arg-type]
            Space("pull", words, _tool(place, "disk", copy_all), 24),  # type: ignore[arg-type]
        )
    ),
]
