"""`python -m danling_core.launcher`: started by `danling_core.launch.Launcher`, not by hand."""

from __future__ import annotations

import sys

from danling_core.launcher.serve import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
