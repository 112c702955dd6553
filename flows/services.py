"""`danling up --write`: files that run it as a service, to be read and changed."""

from __future__ import annotations

import os
import sys
from importlib import resources
from pathlib import Path
from typing import Literal

from danling_core.errors import ConfigError
from flows.cli_text import say
from flows.exit_codes import DONE

_FILES = {"systemd": "danling.service", "compose": "compose.yaml"}


def write(kind: Literal["systemd", "compose"]) -> int:
    """Write the file into the current folder, with this folder and this Python in it."""
    import prefect

    file = Path(_FILES[kind])
    if file.exists():
        raise ConfigError(f"{file} is there, and is not written again: remove it first")
    text = (resources.files("flows") / "templates" / file.name).read_text()
    known = {
        "@FOLDER@": os.getcwd(),
        "@PYTHON@": sys.executable,
        "@DANLING@": str(Path(sys.executable).with_name("danling")),
        "@PREFECT@": prefect.__version__,
    }
    for name, value in known.items():
        text = text.replace(name, value)
    file.write_text(text)
    say(f"wrote {file}: its first lines say what to do with it")
    return DONE
