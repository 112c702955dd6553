"""`danling predict`: a run's model on a split, in this process, with a progress bar."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from flows.cli_text import say


def predict_split(
    root: str, run: str, checkpoint: str, split: str, out: str, overrides: Sequence[str]
) -> int:
    """Write the predictions and say how many there are; return the exit code."""
    from danling_core import storage
    from danling_core.runs.finding import resolve
    from danling_core.runs.folder import find_checkpoints
    from danling_core.tools.predict import predict

    folder = resolve(root, run)
    sys.path.insert(0, os.getcwd())  # as `danling run` does, for the runner's module
    place = storage.join(find_checkpoints(folder), checkpoint)
    count = predict(place, split, out, overrides, watch=_watched)
    say(f"{count} prediction(s) for split {split!r} of {place}: {out}")
    return 0


def _watched(batches: Iterable[Any]) -> Iterable[Any]:
    """Count the batches on a terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.completed} batches"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        for batch in batches:
            yield batch
            progress.advance(task)
