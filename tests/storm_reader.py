"""A reader in a process of its own: `python -m tests.storm_reader ROOT` looks at runs until its stdin ends.

Prints one JSON object: how often it looked, how many checkpoints it read whole, and all it saw that was torn.
"""

from __future__ import annotations

import json
import select
import sys
from pathlib import Path

from danling_core.checkpoints.store import CheckpointStore
from danling_core.errors import CheckpointError
from danling_core.runs.folder import RunFolder


def look(path: Path) -> tuple[int, list[str]]:
    """How many checkpoints of a run could be read whole, and what was torn."""
    store = CheckpointStore(str(path))
    records, bad = store.survey()
    torn, whole = [f"record {each.name}: {each.reason}" for each in bad], 0
    for record in records:
        try:
            store.verify(record)
            whole += 1
        except CheckpointError as error:
            if record in store.records():  # else it was pruned meanwhile
                torn.append(f"checkpoint {record.name}: {error}")
    for name in ("latest", "best"):
        try:
            store.pointed(name)
        except CheckpointError as error:
            torn.append(f"pointer {name}: {error}")
    folder = RunFolder(str(path.parent))
    folder.read_status()
    for url in (folder.results_url, folder.latest_url, folder.best_url):
        if Path(url).exists():
            json.loads(Path(url).read_text())
    return whole, torn


def main(root: str) -> int:
    looks = whole = 0
    torn: list[str] = []
    while not select.select([sys.stdin], [], [], 0.05)[0]:
        for path in Path(root).glob("*/*/checkpoints"):
            found, problems = look(path)
            looks, whole = looks + 1, whole + found
            torn += problems
    print(json.dumps({"looks": looks, "whole": whole, "torn": torn}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
