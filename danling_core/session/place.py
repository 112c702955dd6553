"""The names and the folder of a run, before and after its folder is claimed."""

from __future__ import annotations

import os
import sys
from functools import cached_property
from uuid import UUID

from danling_core import storage
from danling_core.config import Config
from danling_core.identity.cells import code_id
from danling_core.identity.ids import Identity, identify
from danling_core.session.context import RunContext


class RunPlace:
    """Names and folder of a run.

    Args:
        config: of the run.
        runner: the runner's class; its file's repository is the run's code.
        context: the folder that a worker gave the runner; None until the runner has claimed one by itself.
    """

    def __init__(self, config: Config, runner: type, context: RunContext | None = None) -> None:
        self.context = context
        self.created_at = ""
        """The timestamp of a run that has no folder yet."""
        file: str | None = getattr(sys.modules.get(runner.__module__), "__file__", None)
        self.source_file = (
            None if file is None or file.startswith("<") else file
        )  # `python -` calls it <stdin>
        self._config = config
        self._runner = runner
        self._identity: Identity | None = None

    @property
    def identity(self) -> Identity:
        if self._identity is None:
            config = self._config
            if self.source_file is None and config.experiment_id is None:
                config = config.model_copy(update={"experiment_id": code_id(self._runner)})
            self._identity = identify(config, self.source_file)
        return self._identity

    @property
    def id(self) -> str:
        return self.identity.id

    @property
    def name(self) -> str:
        return self.identity.name

    @property
    def uuid(self) -> UUID:
        return self.identity.uuid

    @property
    def timestamp(self) -> str:
        if self._config.dir is not None:
            return self.created_at
        return storage.base_name(self.dir)

    @property
    def dir(self) -> str:
        """Return the run's folder; before it is claimed, that of the run that `train` will resume, or a new one."""
        if self.context is not None:
            return self.context.url
        if self._config.dir is not None:
            return self._config.dir
        return self._before_claim

    @cached_property
    def _before_claim(self) -> str:
        from danling_core.session.open_run import newest_folder

        found = newest_folder(self._config, self.identity)
        if found is not None:
            return found.url
        return storage.join(self._config.project_root, f"{self.name}-{self.id}", self.created_at)

    @property
    def checkpoint_dir(self) -> str:
        if self._config.checkpoint_dir is not None:
            return self._config.checkpoint_dir
        return storage.join(self.dir, self._config.checkpoint_dir_name)

    @property
    def log_path(self) -> str:
        return self._config.log_path or storage.join(self.dir, "run.log")

    @property
    def work_dir(self) -> str:
        """Return the local folder that ranks write to; only once the run is claimed."""
        return self._claimed.work_dir

    @property
    def local_checkpoint_dir(self) -> str:
        """Local folder of checkpoints; only once the run is claimed."""
        if self._config.checkpoint_dir is not None:
            return self._config.checkpoint_dir
        return os.path.join(self.work_dir, self._config.checkpoint_dir_name)

    @property
    def is_local(self) -> bool:
        """Return whether the run is kept where its ranks write it, so that nothing is uploaded."""
        return self.context is None or storage.is_local(self.context.url)

    @property
    def is_launched(self) -> bool:
        """Return whether a launcher of ours started the ranks."""
        return self.context is not None and self.context.is_launched

    @property
    def _claimed(self) -> RunContext:
        assert self.context is not None, "the run's folder is not claimed yet"
        return self.context

    def identity_fields(self) -> dict[str, str]:
        """Return name, id and timestamp, as every result file states them."""
        return {"name": self.name, "id": self.id, "timestamp": self.timestamp}
