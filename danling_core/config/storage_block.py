"""A config may name a block of Prefect that holds the store's credentials: which kinds, and what without Prefect."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from danling_core import storage
from danling_core.errors import ConfigError

if TYPE_CHECKING:
    from danling_core.config import Config

logger = logging.getLogger("danling")

KINDS = {
    "aws-credentials": ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"),
    "minio-credentials": ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"),
    "gcp-credentials": ("GOOGLE_APPLICATION_CREDENTIALS",),
}
"""Types of blocks, and the variables that give a process such credentials without one."""
LOADED = "DANLING_STORAGE_BLOCK"
"""The variable that says which block's content is in the environment; flows set it, their children inherit it."""


def is_on_store(config: Config) -> bool:
    """Return whether the run's folder or its checkpoints are on a store, which wants credentials."""
    urls = (config.dir or config.project_root, config.checkpoint_dir)
    return not all(storage.is_local(url) for url in urls if url)


def check_loaded(config: Config) -> None:
    """Refuse a `storage_block` that was not loaded; with other credentials in the environment, only warn.

    Called before anything is read: by the flows after they loaded it, by `torchrun` and scripts, which cannot.

    Raises:
        ConfigError: there are none.
    """
    name = config.storage_block
    if name is None or os.environ.get(LOADED) == name or not is_on_store(config):
        return
    instead = KINDS[name.partition("/")[0]]
    if any(os.environ.get(variable) for variable in instead):
        logger.warning(
            "storage_block %r is read by the flows only: using the environment's credentials", name
        )
        return
    raise ConfigError(
        f"storage_block {name!r} is a block of Prefect, which only `danling` and the flows read. Here set "
        f"{' or '.join(instead)} in the environment, or storage_block=null for the credentials of this machine"
    )
