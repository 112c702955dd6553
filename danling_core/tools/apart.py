"""A run's runner in this process, apart from the run: for tools that use its model and leave the run as it is."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from danling_core.config import Config
from danling_core.runner import Runner

_QUIET: dict[str, Any] = {
    **dict.fromkeys(("dir", "checkpoint_dir", "log_path", "scratch", "storage_block")),
    "log": False,
    "tensorboard": False,
    "loggers": (),
    "progress_bar": False,
    "slots": {},
    "nproc_per_node": "auto",
}


def runner_apart(config: Config, folder: str, **fields: Any) -> Any:
    """Return a runner of a config on one rank, which writes nothing but into `folder`.

    Args:
        folder: a temporary one, in place of the project root.
        fields: of the config, to be replaced as well.
    """
    return Runner.from_yamls(config.replace(project_root=folder, **{**_QUIET, **fields}).yamls())


@contextlib.contextmanager
def without_log() -> Iterator[None]:
    """Silence the log inside the block: that of a run which this is not."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
