"""The writers of one opening of a run: the text log, curves, tracking services and progress bar."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from danling_core import storage
from danling_core.config import Config
from danling_core.errors import DanLingError
from danling_core.runs.folder import LOG
from danling_core.session.place import RunPlace
from danling_core.writers import ProgressBar, TensorBoardWriter, TextLog
from danling_core.writers.services import Service, open_service

if TYPE_CHECKING:
    from danling_core.parallel.ranks import Ranks
    from danling_core.train.limits import Limits

logger = logging.getLogger("danling")


def open_text_log(config: Config, place: RunPlace, ranks: Ranks) -> TextLog:
    """Open the text log of this rank. Under a launcher the console already goes to the run's log file."""
    path = None
    if config.log and ranks.is_main_process and place.context is not None and not place.is_launched:
        path = text_log_path(config.log_path, place.work_dir)
    by_epoch = config.epoch_end is not None
    return TextLog(
        path,
        rank=ranks.rank,
        total=config.epoch_end if by_epoch else config.step_end,
        label="epoch" if by_epoch else "step",
    ).open()


def text_log_path(log_path: str | None, work_dir: str) -> str:
    """Return the local file of the text log: the config's, unless that is on a store, or the run's own."""
    if log_path is None or not storage.is_local(log_path):
        return os.path.join(work_dir, LOG)
    return storage.local_path(log_path)


def store_text_log(config: Config, place: RunPlace) -> None:
    """Upload the text log to the store that `log_path` names. Rank 0, at the end; a failure is logged."""
    if not config.log or config.log_path is None or storage.is_local(config.log_path):
        return
    try:
        storage.put_file(text_log_path(config.log_path, place.work_dir), config.log_path)
    except DanLingError as error:
        logger.error("the text log is only here, in %s: %s", place.work_dir, error)


def open_tensorboard(
    config: Config, place: RunPlace, latest_index: int | None, completed_steps: int
) -> TensorBoardWriter | None:
    """Open the curves where a resume stands, or None where the config wants none. Rank 0."""
    if not config.tensorboard:
        return None
    return TensorBoardWriter(
        os.path.join(place.work_dir, "tensorboard"),
        config.canonical(),
        purge_step=0 if latest_index is None else latest_index + 1,
        completed_steps=completed_steps,
    )


def open_services(config: Config, place: RunPlace) -> list[Service]:
    """Open the tracking services that the config names. Rank 0."""
    return [
        open_service(
            name,
            experiment=config.experiment_name,
            run_id=f"{place.id}-{place.timestamp}",  # a run begun anew beside another one has its id, too
            run_name=place.name,
            group=config.group,
            config=config.canonical(),
            log_dir=place.work_dir,
        )
        for name in config.loggers
    ]


def open_progress_bar(config: Config, place: RunPlace, limits: Limits) -> list[Any]:
    """Open the progress bar, where this terminal is the run's own. Rank 0."""
    if not config.progress_bar or place.is_launched:
        return []
    return [ProgressBar(limits.epoch_end, limits.step_end, description=place.name)]
