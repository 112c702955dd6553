"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.cli_text import visible
from flows.leaderboard import cell, columns

_WIDE = 10_000


def print_table(
    rows: Sequence[dict[str, Any]], title: str | None = None, hide: Sequence[str] = ("seconds", "behind")
) -> None:
    """Print rows as a table: folded into a terminal, or on long lines that a script can read."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    names = [name for name in columns(rows) if name not in hide]
    for name in names:
        is_number = any(isinstance(row.get(name), int | float) for row in rows)
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(visible(cell(row.get(name))) for name in names))
    console.print(table, markup=False, highlight=False)
