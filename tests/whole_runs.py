"""Whole runs through the real launcher, and their comparison bit for bit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from danling_core.checkpoints.codec import load_state
from danling_core.checkpoints.store import CheckpointStore
from danling_core.config import Config
from danling_core.launch.client import Launcher, Outcome
from danling_core.launch.plan import RunPlan
from danling_core.runs.folder import RunFolder, Status
from danling_core.session.open_run import open_run
from tests.faulty_runner import FAULT

ROOT = str(Path(__file__).parent.parent)
# Stated, so that the id of a run does not change when somebody edits a file while the tests run.
EXPERIMENT_ID = "e" * 40


def config(root: Path | str, **fields: Any) -> Config:
    """A run of `FaultyRunner`: 2 ranks, 3 epochs of 8 steps, a checkpoint every 3, unless told otherwise."""
    known: dict[str, Any] = {
        "runner": "tests.faulty_runner:FaultyRunner",
        "experiment_id": EXPERIMENT_ID,
        "project_root": str(root),
        "nproc_per_node": 2,
        "device": "cpu",
        "save_interval_steps": 3,
        "score_name": "accuracy",
        "dataloader": {"batch_size": 4},
        "optim": {"name": "adamw", "lr": 0.02},
        "log_interval": 2,
        "sanity_batches": 0,  # runners here die on purpose
    }
    if not {"step_end", "iter_end"} & set(fields):
        known["epoch_end"] = 3
    return Config.load({**known, **fields})


@dataclass(frozen=True)
class Ended:
    """A run's folder and how its launch ended; `outcome` is None for a run that was complete already."""

    path: Path
    outcome: Outcome | None

    @property
    def status(self) -> Status:
        found = RunFolder(str(self.path)).read_status()
        assert found is not None
        return found

    @property
    def log(self) -> str:
        return (self.path / "run.log").read_text()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "events.jsonl").read_text().splitlines()]

    def store(self) -> CheckpointStore:
        return CheckpointStore(str(self.path / "checkpoints"))

    def state(self, name: str = "latest") -> dict[str, Any]:
        record = self.store().pointed(name)
        assert record is not None
        return load_state(self.store(), record)

    def json(self, name: str) -> Any:
        content = json.loads((self.path / name).read_text())
        for field in ("timestamp", "checkpoint"):  # told by the folder, and by the attempt
            content.pop(field, None)
        return content

    def must_equal(self, other: Ended) -> None:
        """Weights, optimizer, generators, results: bit for bit."""
        for name in ("latest", "best"):
            found = differences(self.state(name), other.state(name))
            assert not found, f"{name}: {found}"
        for name in ("results.json", "latest.json", "best.json", "evaluation.json"):
            assert self.json(name) == other.json(name), name


def launch(launcher: Launcher, wanted: Config, timeout_seconds: float = 100, **request: Any) -> Ended:
    """Open the run, launch it once and wait for the end, as a driver does."""
    plan = RunPlan.of(launcher.prepare([wanted.dict()], cwd=ROOT)[0])
    opened = open_run(plan.config, plan.identity, source_file=plan.source_file)
    path = Path(opened.work_dir)
    if opened.lease is None:
        return Ended(path, None)
    with opened.lease.beating():
        asked = replace(plan.request(opened, stages=("train", "evaluate")), **request)
        outcome = launcher.run(asked, cwd=ROOT).outcome(timeout_seconds)
    opened.lease.release()
    return Ended(path, outcome)


@contextmanager
def fault(
    how: str, step: int, *, rank: int = 0, place: str = "train", attempt: str | None = "1.0"
) -> Iterator[None]:
    """Ranks launched inside the block meet this fault. `attempt` None: every time."""
    spec = {"how": how, "step": step, "rank": rank, "place": place, "attempt": attempt}
    os.environ[FAULT] = json.dumps(spec)
    try:
        yield
    finally:
        del os.environ[FAULT]


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two states differ, bit for bit, by path; how long it took is no part of them."""
    if path == "/progress/seconds":
        return []
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        odd = [f"{path}/{key}: on one side only" for key in a.keys() ^ b.keys()]
        return odd + [
            found for key in a.keys() & b.keys() for found in differences(a[key], b[key], f"{path}/{key}")
        ]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [found for index, (x, y) in pairs for found in differences(x, y, f"{path}/{index}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return [] if same else [f"{path}: tensors"]
    return [] if type(a) is type(b) and (a == b or (a != a and b != b)) else [f"{path}: {a!r} and {b!r}"]
