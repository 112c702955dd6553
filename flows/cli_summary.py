"""`danling summary`: the modules of a config's model, and the memory that training it will hold."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from flows.cli_text import say


def print_summary(file: str, overrides: Sequence[str]) -> int:
    """Print a table of the modules, and the sums; return the exit code."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from danling_core.tools.summary import summarise

    sys.path.insert(0, os.getcwd())  # as `danling run` does, for the runner's module
    found = summarise(file, overrides)
    table = Table(box=None, pad_edge=False)
    for name, side in (("module", "left"), ("class", "left"), ("input", "left"), ("output", "left")):
        table.add_column(name, justify=side, overflow="fold")  # type: ignore[arg-type]
    table.add_column("parameters", justify="right")
    for row in found.rows:
        frozen = f" ({row.parameters - row.trainable:,} frozen)" if row.trainable < row.parameters else ""
        parameters = f"{row.parameters:,}{frozen}" if row.parameters else ""
        cells = ("  " * row.depth + row.name, row.kind, row.inputs, row.output, parameters)
        table.add_row(*map(Text, cells))
    Console(soft_wrap=not sys.stdout.isatty()).print(table)
    say(f"{found.parameters:,} parameters, {found.parameters - found.trainable:,} of them frozen")
    parts = [f"{name} {_readable(size)}" for name, size in found.memory.items() if size]
    say(
        f"memory on each rank, without activations: {_readable(sum(found.memory.values()))} ({', '.join(parts)})"
    )
    return 0


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
