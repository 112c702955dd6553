"""Explores every crash point and fills the tables of docs/crash-points.md: about 15 minutes on two cores."""

from __future__ import annotations

import logging
import multiprocessing
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.explorer import invariants  # noqa: E402
from tests.explorer.disk import MODELS  # noqa: E402
from tests.explorer.spaces import SPACES, Explored, Kind, Space, explore  # noqa: E402

PAGE = ROOT / "docs" / "crash-points.md"
_KINDS: tuple[Kind, ...] = ("crash", "death", "lost answer", "two owners")


def main() -> int:
    """Explore everything and write the page; return the exit code, 1 where something broke."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(zip(SPACES, pool.map(_explore, range(len(SPACES))), strict=True))
    page = PAGE.read_text()
    for name, lines in (("cases", _cases(found)), ("models", _models()), ("invariants", _invariants())):
        made = "\n".join(lines)
        page = re.sub(rf"(<!-- made: {name} -->\n).*?(<!-- end -->)", rf"\1{made}\n\2", page, flags=re.DOTALL)
    PAGE.write_text(page)
    return 1 if any(explored.broken for _, explored in found) else 0


def _explore(number: int) -> Explored:
    """Explore one space, in a process of its own."""
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    space, began = SPACES[number], time.monotonic()
    found = explore(space)
    print(f"{space.name}: {found.counts} in {time.monotonic() - began:.0f} s", flush=True)
    for case, what in found.broken.items():
        print(f"  {case}: {what}", flush=True)
    return found


def _cases(found: list[tuple[Space, Explored]]) -> list[str]:
    rows = [f"| protocol | place | {' | '.join(_KINDS)} | broken |", "|---|---|---|---|---|---|---|"]
    for space, explored in found:
        counts = [str(explored.counts.get(kind, "")) for kind in _KINDS]
        rows.append(f"| {space.protocol} | {space.place} | {' | '.join(counts)} | {len(explored.broken)} |")
    total = [str(sum(explored.counts.get(kind, 0) for _, explored in found)) for kind in _KINDS]
    return [*rows, f"| all | | {' | '.join(total)} | {sum(len(explored.broken) for _, explored in found)} |"]


def _models() -> list[str]:
    return [f"- **{name}**: {rule}" for name, rule in MODELS.items()]


def _invariants() -> list[str]:
    names = [value for name, value in vars(invariants).items() if name.isupper() and isinstance(value, str)]
    return [f"- {value}" for value in names]


if __name__ == "__main__":
    sys.exit(main())
