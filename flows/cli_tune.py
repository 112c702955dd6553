"""`danling tune`: a setting that is tried for a few steps, with a picture and a proposed override."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from danling_core.errors import ConfigError
from flows.cli_chart import chart
from flows.cli_text import say
from flows.exit_codes import DONE, FAILED


def tune_rate(
    file: str, overrides: Sequence[str], lowest: float, highest: float, steps: int, out: str | None
) -> int:
    """Make a range test, show its curve, and propose a rate; return the exit code."""
    from danling_core.tools.tune.rate import range_test
    from flows.curves import chart_image

    if out is not None and not out.endswith(".svg"):
        raise ConfigError(f"--out {out}: the picture is an .svg file")
    with _prepared():
        found = range_test(
            file,
            overrides,
            lowest=lowest,
            highest=highest,
            count=steps,
            watch=lambda losses: _bar(losses, steps),
        )
    finite = [index for index, loss in enumerate(found.smoothed) if math.isfinite(loss)]
    smoothed, rates = [found.smoothed[index] for index in finite], [found.rates[index] for index in finite]
    if not rates:
        say("the loss was not finite from the first step on: look at the data and the model")
        return FAILED
    proposed = found.proposed
    mark = None if proposed is None else rates.index(proposed)
    top = sorted(smoothed)[int(len(smoothed) * 0.95)]  # a curve that shoots up at its end would hide the rest
    say("loss over the learning rate, smoothed:")
    say(chart([min(loss, top) for loss in smoothed], f"{rates[0]:.2g}", f"{rates[-1]:.2g}", mark))
    if out is not None:
        points = [(math.log10(rate), loss) for rate, loss in zip(rates, smoothed, strict=True)]
        marked = {} if mark is None else {"proposed": [(points[mark][0], y) for y in (min(smoothed), top)]}
        curves = {"loss": [(x, min(y, top)) for x, y in points], **marked}
        Path(out).write_text(chart_image("loss over the learning rate", curves, lambda x: f"{10**x:.2g}"))
        say(f"picture: {out}")
    if proposed is None:
        say("the loss never fell: nothing to propose; try more steps, or other bounds (--lowest, --highest)")
        return FAILED
    if found.has_diverged:
        say(f"ended at {found.rates[-1]:.2g}: the loss left all bounds")
    how = "where the loss falls fastest"
    if found.key is None:
        say(f"proposed: {proposed:.2g}, {how}; the runner makes its rate itself, so no key is it")
    else:
        say(f"proposed: {found.key}={proposed:.2g}, {how}")
        say(f"  danling run {file} {' '.join([*overrides, f'{found.key}={proposed:.2g}'])}")
    return DONE


def tune_batch(file: str, overrides: Sequence[str], largest: int | None, steps: int) -> int:
    """Search for the largest batch, show what each size is worth, and propose one; return the exit code."""
    from danling_core.tools.tune.batch import batch_search

    with _prepared():
        trials = batch_search(
            file,
            overrides,
            largest=largest,
            count=steps,
            watch=lambda trial: say(f"{trial.batch_size}: {trial.failed or 'fits'}", file=sys.stderr),
        )
    good = [trial for trial in trials if trial.samples_per_second is not None]
    fastest = max(trial.samples_per_second or 0.0 for trial in good)
    for trial in trials:
        rate = trial.samples_per_second or 0.0
        bar = "#" * round(30 * rate / fastest)
        size = f"{trial.batch_size:>8}"
        memory = f"{(trial.memory_bytes or 0) / 1e9:6.2f} GB"
        say(
            f"{size}  {trial.failed}" if trial.failed else f"{size}  {rate:>10.1f} samples/s  {memory}  {bar}"
        )
    most = good[-1].batch_size
    enough = next(trial.batch_size for trial in good if (trial.samples_per_second or 0.0) >= 0.95 * fastest)
    if enough < most:
        say(
            f"proposed: dataloader.batch_size={enough}: larger ones are no faster; {most} is the largest that fits"
        )
    else:
        say(f"proposed: dataloader.batch_size={most}, the largest that was tried and fits")
    say("another batch size is another training: see scale_lr for the learning rate")
    return DONE


def _prepared() -> contextlib.AbstractContextManager[None]:
    from danling_core.tools.apart import without_log

    sys.path.insert(0, os.getcwd())  # as `danling run` does, for the runner's module
    return without_log()


def _bar(losses: Iterable[float], total: int) -> Iterable[float]:
    """Show a bar on a terminal, while there are losses."""
    from rich.console import Console
    from rich.progress import track

    console: Any = Console(stderr=True)
    return track(
        losses, "steps", total=total, console=console, transient=True, disable=not console.is_terminal
    )
