"""Data of other libraries, stopped in the middle of an epoch and resumed to the same bits; with real forks."""

from __future__ import annotations

import gc
import json
import logging
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from danling_core.errors import ConfigError, RunInterrupted
from tests import foreign_data as data
from tests.ranks import Ranks
from tests.small_runner import config, weights

SOURCES: dict[str, tuple[Callable[[Path], Any], bool]] = {
    "map-style": (lambda folder: data.hugging_face(), False),
    "stream": (lambda folder: data.streamed(), True),
    "shuffle buffer": (lambda folder: data.shuffled_stream(), False),
    "stream in a loader": (lambda folder: DataLoader(data.streamed(), batch_size=4), True),
    "webdataset": (data.seeded_web, False),
    "stateful": (lambda folder: data.stateful(), True),
    "stateful, workers": (lambda folder: data.stateful(2), True),
    "stateful, random numbers": (lambda folder: data.stateful(draws=True), True),
    "stateful, random numbers in workers": (lambda folder: data.stateful(2, draws=True), False),
    "own": (lambda folder: data.Own(), True),
    "own, forgetful": (lambda folder: data.Own(is_whole=False), False),
}
"""By name: what makes the data, and whether its state is enough to go on by."""


def runner_of(make: Callable[[], Any], root: Path, **fields: Any) -> data.ForeignRunner:
    kind = type("Foreign", (data.ForeignRunner,), {"make": staticmethod(make)})
    made = make()
    options = {} if isinstance(made, DataLoader) else {"batch_size": 4}
    fields = {
        "epoch_end": 3,
        "sanity_batches": 2,
        "dataloader": {**options, "val": {"batch_size": 7}},
        **fields,
    }
    gc.collect()  # no loader workers of the runner before, which a fork would wait for
    runner: data.ForeignRunner = kind(config(root, **fields))
    return runner


def stopped(make: Callable[[], Any], root: Path, at: int, **fields: Any) -> data.ForeignRunner:
    runner = runner_of(make, root, **fields)
    step = type(runner).train_step

    def train_step(self: Any, batch: Any) -> Any:
        if self.steps == at:
            self.request_stop("asked by the test")
        return step(self, batch)

    type(runner).train_step = train_step  # type: ignore[method-assign]
    with pytest.raises(RunInterrupted):
        runner.train()
    type(runner).train_step = step  # type: ignore[method-assign]
    return runner


FAST = [
    ("own", "plain"),
    ("own", "limited"),
    ("own, forgetful", "saves"),
    ("stateful", "plain"),
    ("stateful", "segments"),
]
SHORT = ("shuffle buffer", "stateful", "own", "own, forgetful")
# Stopped two steps later: inside a pass of ten steps, at its end, in the second.
CASES = [
    *(pytest.param(name, (15,), id=name) for name in SHORT),
    *(
        pytest.param(
            name, (8, 15) if "workers" in name else (6, 8, 15), id=f"{name}, long", marks=pytest.mark.long
        )
        for name in SOURCES
    ),
]


@pytest.mark.parametrize(("name", "stops"), CASES)
def test_data_of_other_libraries_goes_on_where_it_was(
    name: str, stops: tuple[int, ...], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    make, by_state = SOURCES[name]
    make_here = partial(make, tmp_path / "data")
    peace = runner_of(make_here, tmp_path / "peace")
    peace.train()
    for at in stops:
        root = tmp_path / str(at)
        stopped(make_here, root, at)
        second = runner_of(make_here, root)
        second.train()
        is_told = name == "own, forgetful" and at > 8  # which counts its passes, and lost count
        assert second._parts.setup.is_bitwise is not is_told
        recall = second._parts.splits.streams["train"].recall
        assert (recall is not None) is by_state
        if not is_told:
            assert second.seen == peace.seen
            assert weights(second) == weights(peace) and second.results == peace.results


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "limited": {"limit_batches": {"train": 7}},
    "segments": {"epoch_end": None, "step_end": 30, "evaluate_interval_steps": 10},
    "saves": {"save_interval_steps": 4},
    "windows": {"accum_steps": 3},
}
KILLED = [
    pytest.param(name, variant, marks=[] if (name, variant) in FAST else [pytest.mark.long])
    for name in SOURCES
    for variant in VARIANTS
    if "workers" not in name or variant == "plain"
]


@pytest.mark.parametrize(("name", "variant"), KILLED)
def test_a_kill_after_a_save_costs_no_bit_or_is_said(name: str, variant: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    make = partial(SOURCES[name][0], tmp_path / "data")
    peace = runner_of(make, tmp_path / "peace", **VARIANTS[variant])
    peace.train()
    for at in (1, 7, 10, 13, 16) if variant != "windows" else (1, 4, 5):
        runner = runner_of(make, tmp_path / str(at), **VARIANTS[variant])
        runner.dies_at = at
        with pytest.raises(data.Died):
            runner.train()
        again = runner_of(make, tmp_path / str(at), **VARIANTS[variant])
        again.train()
        is_same = again.seen == peace.seen and weights(again) == weights(peace)
        assert is_same is again._parts.setup.is_bitwise, (at, again._parts.setup.reasons)
        if name != "own, forgetful":
            assert is_same


def test_two_stops_between_two_passes_lose_nothing(tmp_path: Path) -> None:
    """The second save is made before a window is drawn."""
    peace = runner_of(data.Own, tmp_path / "peace")
    peace.train()
    for _ in range(2):
        runner = runner_of(data.Own, tmp_path / "run")
        step = runner.evaluate_step
        runner.evaluate_step = lambda batch, runner=runner, step=step: (
            runner.request_stop("now"),
            step(batch),
        )[1]  # type: ignore[func-returns-value,method-assign,misc]
        with pytest.raises(RunInterrupted):
            runner.train()
    again = runner_of(data.Own, tmp_path / "run")
    again.train()
    assert again.seen == peace.seen and weights(again) == weights(peace)


@pytest.mark.parametrize("name", ["stream", "stateful", "own"])
def test_a_step_that_spoils_its_batch_is_no_matter(name: str, tmp_path: Path) -> None:
    make = partial(SOURCES[name][0], tmp_path)
    _, by_state = SOURCES[name]

    def spoiling(root: Path) -> data.ForeignRunner:
        runner = runner_of(make, root)
        type(runner).spoils = True
        return runner

    peace = spoiling(tmp_path / "peace")
    peace.train()
    first = spoiling(tmp_path / "run")
    first.dies_at = 13
    first.training_state.ignore("dies_at")
    with pytest.raises(data.Died):
        first.train()
    again = spoiling(tmp_path / "run")
    again.train()
    assert again.seen == peace.seen and again._parts.setup.is_bitwise
    assert (again._parts.splits.streams["train"].recall is not None) is by_state


@pytest.mark.parametrize("name", ["shuffle buffer", "own, forgetful"])
def test_batches_of_a_class_of_ones_own_are_compared_too(name: str, tmp_path: Path) -> None:
    make = partial(SOURCES[name][0], tmp_path)

    def collating(root: Path) -> data.ForeignRunner:
        runner = runner_of(make, root, epoch_end=1)
        runner.collate_fn = data.as_batch
        return runner

    peace = collating(tmp_path / "peace")
    peace.train()
    first = collating(tmp_path / "run")
    step = type(first).train_step

    def train_step(self: Any, batch: Any) -> Any:
        if self.steps == 5:
            self.request_stop("asked by the test")
        return step(self, batch)

    type(first).train_step = train_step  # type: ignore[method-assign]
    with pytest.raises(RunInterrupted):
        first.train()
    again = collating(tmp_path / "run")
    again.train()
    assert again.seen == peace.seen and len(peace.seen) == 10
    assert again._parts.splits.streams["train"].recall is None


def test_a_shuffle_without_a_seed_is_said_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("danling").addHandler(caplog.handler)
    runner_of(lambda: data.streamed().shuffle(buffer_size=12), tmp_path / "unseeded", epoch_end=1).train()
    told = [record.message for record in caplog.records if "given no seed" in record.message]
    assert len(told) == 1 and ".shuffle(seed=0" in told[0] and "generator)" in told[0]
    caplog.clear()
    runner_of(data.shuffled_stream, tmp_path / "seeded", epoch_end=1).train()
    logging.getLogger("danling").removeHandler(caplog.handler)
    assert not any("given no seed" in record.message for record in caplog.records)


def test_a_kill_before_there_is_a_state_leaves_it_to_be_taken_later(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"save_interval_steps": 1}
    peace = runner_of(data.Own, tmp_path / "peace", **fields)
    peace.train()
    for at in (
        1,
        6,
    ):  # after the first window, which has no state; then by the state that the second start took
        runner = runner_of(data.Own, tmp_path / "run", **fields)
        runner.dies_at = at
        with pytest.raises(data.Died):
            runner.train()
    again = runner_of(data.Own, tmp_path / "run", **fields)
    again.train()
    assert again.seen == peace.seen and weights(again) == weights(peace)
    assert again._parts.splits.streams["train"].recall is not None and again._parts.setup.is_bitwise


class Jittered(data.Dropped):
    """Map-style data with a generator of its own."""

    def __init__(self, rows: Any, seed: int | None) -> None:
        super().__init__(rows)
        self.jitter = np.random.default_rng(seed)

    def __getitem__(self, index: int) -> Any:
        row = self.data[index]
        return {**row, "input": row["input"] + float(self.jitter.random())}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["seeded", "unseeded", "shuffled", "shuffled by the system"])
def test_a_generator_of_map_style_data_is_right_or_said(
    kind: str, workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def make() -> Any:
        rows = data.hugging_face()
        if kind == "shuffled":  # by NumPy's global generator, which the runner seeds
            return rows.shuffle()
        if kind == "shuffled by the system":
            return rows.select(random.SystemRandom().sample(range(data.SAMPLES), data.SAMPLES))
        return Jittered(data.hugging_face(), 0 if kind == "seeded" else None)

    options = {"batch_size": 4, "num_workers": workers, "val": {"num_workers": 0}}
    logging.getLogger("danling").addHandler(caplog.handler)
    first = stopped(make, tmp_path, 3, epoch_end=1, dataloader=options)
    assert ("given no seed" in caplog.text) is (kind == "unseeded")
    again = runner_of(make, tmp_path, epoch_end=1, dataloader=options)
    again.train()
    logging.getLogger("danling").removeHandler(caplog.handler)
    assert again.seen[: len(first.seen)] == first.seen and len(again.seen) == 10
    is_exact = kind in ("seeded", "shuffled") or (kind == "unseeded" and workers == 0)  # its state is saved
    assert again._parts.setup.is_bitwise is is_exact, again._parts.setup.reasons
    if kind in ("seeded", "shuffled"):
        peace = runner_of(make, tmp_path / "peace", epoch_end=1, dataloader=options)
        peace.train()
        assert again.seen == peace.seen


class Curriculum(data.ForeignRunner):
    """A map-style data set whose level training changes, and which knows how to save it."""

    make = staticmethod(data.hugging_face)

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.datasets["train"] = self.curriculum = Levels(self.datasets["train"])

    def train_step(self, batch: Any) -> Any:
        self.curriculum.level += 0.01
        return super().train_step(batch)


class Levels(data.Dropped):
    level = 1.0

    def __getitem__(self, index: int) -> Any:
        row = self.data[index]
        return {**row, "input": row["input"] * self.level}

    def state_dict(self) -> dict[str, float]:
        return {"level": self.level}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.level = state["level"]


def test_a_map_style_data_set_with_a_state_keeps_it(tmp_path: Path) -> None:
    def run(root: Path, dies_at: int | None) -> Curriculum:
        runner = Curriculum(config(root, epoch_end=3, dataloader={"batch_size": 4}))
        runner.dies_at = dies_at
        return runner

    peace = run(tmp_path / "peace", None)
    peace.train()
    with pytest.raises(data.Died):
        run(tmp_path / "run", 13).train()
    again = run(tmp_path / "run", None)
    again.train()
    assert weights(again) == weights(peace) and again.seen == peace.seen


def test_a_shuffle_by_the_clock_is_said_before_the_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make = partial(data.web, tmp_path)
    logging.getLogger("danling").addHandler(caplog.handler)
    stopped(make, tmp_path / "run", 6)
    logging.getLogger("danling").removeHandler(caplog.handler)
    told = next(r.message for r in caplog.records if "other samples each time" in r.message)
    assert "split 'train': the WebDataset" in told and "rng=random.Random(0)" in told
    runner = runner_of(make, tmp_path / "run")
    runner.train()
    assert not runner._parts.setup.is_bitwise
    assert "other samples each time" in runner._parts.setup.reasons[0]


def _train(make: Callable[[], Any], root: Path, at: int | None) -> tuple[Any, Any]:
    if at is not None:
        stopped(make, root, at, dataloader={"batch_size": 2, "val": {"batch_size": 7}})
    runner = runner_of(make, root, dataloader={"batch_size": 2, "val": {"batch_size": 7}})
    runner.train()
    return weights(runner), runner._parts.splits.streams["train"].recall is not None


@pytest.mark.parametrize("make", [pytest.param(data.streamed, marks=pytest.mark.long), data.Own])
def test_two_ranks_go_on_by_the_state_of_their_data(
    two_ranks: Ranks, make: Callable[[], Any], tmp_path: Path
) -> None:
    peace = two_ranks.run(_train, make, tmp_path / "peace", None)
    again = two_ranks.run(_train, make, tmp_path / "run", 16)
    assert [found[0] for found in again] == [found[0] for found in peace]
    assert [found[1] for found in again] == [True, True]


def _refused(make: Callable[[], Any], root: Path, split: str) -> str:
    runner = runner_of(data.streamed, root, dataloader={"batch_size": 2})
    runner.datasets[split] = make()
    with pytest.raises(ConfigError) as refused:
        runner.train()
    return f"{runner.steps} {refused.value}"


class OtherOnEachRank(data.Own):
    """Shuffles by a seed that each rank draws."""

    def __init__(self) -> None:
        super().__init__()
        import random

        self.pass_number = random.randrange(1 << 30)


@pytest.mark.parametrize("split", ["train", "val"])
def test_ranks_that_would_read_other_samples_are_refused(
    two_ranks: Ranks, split: str, tmp_path: Path
) -> None:
    for index, make in enumerate((partial(data.web, tmp_path), OtherOnEachRank)):
        for answer in two_ranks.run(_refused, make, tmp_path / f"{split}{index}", split):
            assert answer.startswith(f"0 split '{split}': the ") and "lost and others doubled" in answer


class Held(data.ForeignRunner):
    """Has its data in an attribute as well, where every checkpoint would hold its state once more."""

    make = staticmethod(data.streamed)

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.source = self.datasets["train"]


def test_data_that_is_also_an_attribute_is_not_taken_up_twice(tmp_path: Path) -> None:
    runner = Held(config(tmp_path, epoch_end=1, sanity_batches=2, dataloader={"batch_size": 4}))
    runner.train()
    assert runner._parts.attributes is not None and runner._parts.attributes.names == []


def test_the_page_on_data_says_what_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each snippet makes data that a runner trains on."""
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data.rows()))
    (tmp_path / "shards").mkdir()
    data.shards(tmp_path / "shards", "x.npy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    given = SimpleNamespace(datasets={}, dataloaders={})
    namespace: dict[str, Any] = {"self": given}
    for index, snippet in enumerate(snippets):
        given.datasets, given.dataloaders = {}, {}
        exec(snippet, namespace)
        source = (given.datasets or given.dataloaders)["train"]
        assert ("val" in given.datasets) is (index == 0)
        runner = runner_of(lambda source=source: source, tmp_path / str(index), epoch_end=1)
        runner.train()
        assert sum(map(len, runner.seen)) == (32 if source is namespace["halves"]["train"] else data.SAMPLES)
