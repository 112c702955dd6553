"""The writers that a run's rank 0 tells of every event."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from danling_core import storage
from danling_core.errors import DanLingError
from danling_core.runs.folder import LOG
from danling_core.writers import ProgressBar, TensorBoardWriter, TextLog
from danling_core.writers.services import Service, open_service

if TYPE_CHECKING:
    from danling_core.runner.torch_setup import TorchSetUp


def open_text_log(runner: TorchSetUp) -> TextLog:
    """The text log of this rank. Under a launcher the console already goes to the run's log file."""
    context = runner._context
    path = None
    if runner.log and runner.is_main_process and context is not None and not context.is_launched:
        path = text_log_path(runner.config.log_path, context.work_dir)
    by_epoch = runner._progress.unit == "epoch"
    return TextLog(
        path,
        rank=runner.rank,
        total=runner.config.epoch_end if by_epoch else runner.config.step_end,
        label="epoch" if by_epoch else "step",
    ).open()


def text_log_path(log_path: str | None, work_dir: str) -> str:
    """The local file of the text log: what the config says, unless that is on a store, or the run's own."""
    if log_path is None or not storage.is_local(log_path):
        return os.path.join(work_dir, LOG)
    return storage.local_path(log_path)


def store_text_log(runner: TorchSetUp) -> None:
    """Bring the text log to the store that `log_path` names. Rank 0, at the end; what fails is only told."""
    config, context = runner.config, runner._context
    if context is None or not config.log or config.log_path is None or storage.is_local(config.log_path):
        return
    try:
        storage.put_file(text_log_path(config.log_path, context.work_dir), config.log_path)
    except DanLingError as error:
        runner.logger.error("the text log is only here, in %s: %s", context.work_dir, error)


def make_writers(runner: TorchSetUp) -> list[Any]:
    """TensorBoard, tracking services and progress bar, as the config asks. Rank 0, after a resume."""
    writers: list[Any] = []
    context = runner._context
    assert context is not None
    if runner.tensorboard:
        latest = runner._results.latest_index
        board = TensorBoardWriter(
            os.path.join(context.work_dir, "tensorboard"),
            runner.config.canonical(),
            purge_step=0 if latest is None else latest + 1,
        )
        runner.writer = board.summary
        writers.append(board)
    if runner._files is not None and not runner._files.status.is_complete:  # else they have been told all
        runner._services = [_open_service(runner, name) for name in runner.config.loggers]
        writers += runner._services
    if runner.config.progress_bar and not context.is_launched:
        writers.append(ProgressBar(runner.epoch_end, runner.step_end, description=runner.name))
    return writers


def _open_service(runner: TorchSetUp, name: str) -> Service:
    context = runner._context
    assert context is not None
    return open_service(
        name,
        experiment=runner.config.experiment_name,
        run_id=f"{runner.id}-{runner.timestamp}",  # a run begun anew beside another one has its id, too
        run_name=runner.name,
        group=runner.config.group,
        config=runner.config.canonical(),
        log_dir=context.work_dir,
    )
