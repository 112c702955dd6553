"""`python -m danling_core.launch`: started by `danling_core.launch.client.Launcher`, not by hand."""

from __future__ import annotations

import sys

from danling_core.launch.serve import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
