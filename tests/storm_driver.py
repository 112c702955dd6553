"""A driver in a process of its own, for tests that kill it: `python -m tests.storm_driver CONFIG.yaml`.

Exits with 0 when the run is complete, 75 when it was interrupted, 1 when it failed or the launcher died.
"""

from __future__ import annotations

import sys

from danling_core.config import Config
from danling_core.errors import DanLingError
from danling_core.launch.client import Launcher
from tests.whole_runs import launch


def main(file: str) -> int:
    try:
        with Launcher() as launcher:
            outcome = launch(launcher, Config.load(file)).outcome
    except DanLingError as error:
        print(error, file=sys.stderr)
        return 1
    print(outcome, file=sys.stderr)
    return 0 if outcome is None else {"complete": 0, "interrupted": 75}.get(outcome.status, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
