"""`python -m tests.explorer` lists the spaces; `... SPACE` explores one, `... SPACE NUMBER` tries one case again."""

from __future__ import annotations

import logging
import sys
import time

from tests.explorer.spaces import SPACES, explore


def main(words: list[str]) -> int:
    """Explore as the command line says; return the exit code."""
    logging.disable(logging.CRITICAL)
    by_name = {space.name: space for space in SPACES}
    if not words:
        print("\n".join(by_name))
        return 0
    space = by_name[words[0]]
    if len(words) > 1 and not words[1].startswith("/"):
        with space.cases() as cases:
            case = cases[int(words[1])]
            print(case.kind, case.where)
            case.check()
        return 0
    began = time.monotonic()
    stride = int(words[1][1:]) if len(words) > 1 else 1
    found = explore(space, stride)
    print(f"{space.name}: {found.counts} in {time.monotonic() - began:.1f} s, {len(found.broken)} broken")
    for number, what in found.broken.items():
        print(f"  {number}: {what}")
    return 1 if found.broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
