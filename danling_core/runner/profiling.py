"""A profile of a few steps: torch's profiler as a callback, its trace in the run's folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from danling_core.callbacks import Callback
from danling_core.config.sections import ProfileConfig

logger = logging.getLogger("danling")
_ROWS = 20


class Profiler(Callback):
    """Profiles steps on every rank, and writes a trace and a table of the dearest operations for each.

    Args:
        config: which steps, and what is noted of them.
        work_dir: returns the run's local folder, once it has one; traces are in `profile` there.
    """

    def __init__(self, config: ProfileConfig, work_dir: Callable[[], str]) -> None:
        self._config = config
        self._work_dir = work_dir
        self._profiler: Any = None
        self._left = config.repeat
        self._rank = 0
        self._step = 0

    def on_fit_start(self, runner: Any) -> None:
        from torch import profiler

        config, kinds = self._config, [profiler.ProfilerActivity.CPU]
        if runner.device.type in ("cuda", "xpu"):
            kinds.append(profiler.ProfilerActivity[runner.device.type.upper()])
        self._rank, self._step, self._left = runner.rank, runner.steps, config.repeat
        self._profiler = profiler.profile(
            activities=kinds,
            schedule=profiler.schedule(
                wait=config.wait, warmup=config.warmup, active=config.active, repeat=config.repeat
            ),
            on_trace_ready=self._write,
            record_shapes=config.record_shapes,
            profile_memory=config.profile_memory,
            with_stack=config.with_stack,
        )
        self._profiler.start()

    def on_step_end(self, runner: Any) -> None:
        if self._profiler is None:
            return
        self._step = runner.steps
        self._profiler.step()
        if self._left <= 0:
            self._stop()

    def on_fit_end(self, runner: Any) -> None:
        if self._profiler is not None:
            missing = self._left > 0
            self._stop()
            if missing and self._left > 0 and runner.is_main_process:
                logger.warning(
                    "training ended before the profile began, which needs %d steps: lower profile.wait and warmup",
                    self._config.wait + self._config.warmup + 1,
                )

    def on_exception(self, runner: Any, error: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()

    def _write(self, profiler: Any) -> None:
        self._left -= 1
        try:
            self._write_files(profiler, os.path.join(self._work_dir(), "profile"))
        except OSError as error:  # a full disk: a trace is not worth a run
            logger.warning("the profile could not be written: %s", error)

    def _write_files(self, profiler: Any, folder: str) -> None:
        os.makedirs(folder, exist_ok=True)
        name = f"rank{self._rank}.{self._step}"
        trace = os.path.join(folder, f"{name}.pt.trace.json.gz")
        unfinished = os.path.join(folder, f".{name}.json.gz")
        profiler.export_chrome_trace(unfinished)
        os.replace(unfinished, trace)
        on_device = any(kind.name != "CPU" for kind in profiler.activities)
        by = "self_device_time_total" if on_device else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=_ROWS)
        with open(os.path.join(folder, f"{name}.txt"), "w") as file:
            file.write(table)
        if self._rank == 0:
            logger.info(
                "profiled up to step %d: %s (ui.perfetto.dev opens it, and so does TensorBoard with "
                "torch-tb-profiler); the dearest operations are in %s.txt beside it",
                *(self._step, trace, name),
            )
