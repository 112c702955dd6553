"""Real processes for what tests/unit/test_writers.py tries without them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.small_runner import config
from tests.unit.test_writers import Scoring


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: in blocks of 32 KiB (the first begins 7 bytes early here), each
    piece with its checksum (4 bytes), length (2) and kind (1: 1 whole, 2 first, 3 middle, 4 last)."""
    at, block, record = 0, 32768, b""
    while at < len(log):
        if block - (at + 7) % block < 7:
            at += block - (at + 7) % block
            continue
        length, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        record += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def offline_record(folder: Path) -> tuple[dict[str, Any], list[dict[str, float]], dict[str, Any]]:
    """Config, history and summary in the one file that W&B left in `folder` for a later upload."""
    from wandb.proto import wandb_internal_pb2

    [path] = folder.glob("offline-run-*/run-*.wandb")
    config: dict[str, Any] = {}
    history: list[dict[str, float]] = []
    summary: dict[str, Any] = {}
    for data in leveldb_records(path.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("history"):
            items = record.history.item
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            history.append({key: value for key, value in row.items() if not key.startswith("_")})
        summary |= {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.summary.update
        }
    return config, history, summary


@pytest.mark.long
@pytest.mark.holds("files-6")
def test_wandb_is_told_of_config_results_own_curves_and_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    runner = Scoring(config(tmp_path, loggers=["wandb"], seed=5))
    status = runner.run()
    assert status is not None
    told, history, summary = offline_record(Path(runner.dir) / "wandb")
    assert told["seed"] == 5
    rows = [row for row in history if "val/accuracy" in row]
    assert [row["index"] for row in rows] == [0, 1]
    assert [row["train/loss"] for row in rows] == [runner.results[i]["train"]["loss"] for i in (0, 1)]
    assert [row["index"] for row in history if "train/mine" in row] == [0, 4]
    assert summary["score"] == status.best_score
    assert summary["evaluation/val/loss"] == pytest.approx(status.evaluation["val"]["loss"])
