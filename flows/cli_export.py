"""`danling export`: a run's model for use without danling."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from danling_core import storage
from danling_core.errors import ConfigError
from flows.cli_text import say


def export_model(
    root: str, run: str, out: str, checkpoint: str, average: int, overrides: Sequence[str]
) -> int:
    """Write a run's model and say what is there; return the exit code."""
    from danling_core.runs.finding import resolve
    from danling_core.tools.apart import without_log
    from danling_core.tools.export import export

    if average < 1:
        raise ConfigError(f"--average is {average}, wanted 1 or more")
    folder = resolve(root, run)
    sys.path.insert(0, os.getcwd())  # as `danling run` does, for the runner's module
    with without_log():
        done = export(folder, out, checkpoint=checkpoint, average=average, overrides=overrides)
    for name in done.files:
        say(name if name == out else storage.join(out, name))
    said = f"{done.weights} of {folder.url}"
    if done.difference is not None:
        how = "the same outputs" if done.difference == 0 else f"outputs within {done.difference:.1g}"
        said += f"; loaded again: {how}"
        said += "" if done.is_batch_free else ", for batches of this size only"
    say(said)
    return 0
