"""`danling run`, `experiment`, `group`: load and validate, train under the flow, report how it ended."""

from __future__ import annotations

import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from danling_core.config import Config
from danling_core.config.overrides import parse_sweep
from danling_core.config.sweep import ExperimentSpec, FanOut, GroupSpec
from danling_core.errors import ConfigError, DanLingError
from danling_core.writers.console import survive_a_closed_console
from flows.busy import IfBusy
from flows.cli_session import Session, SessionEnd
from flows.cli_table import print_table
from flows.cli_text import say
from flows.console import GroupConsole, RunConsole
from flows.exit_codes import BAD_INPUT, DONE, FAILED, INTERRUPTED, RESUMABLE
from flows.leaderboard import leaderboard
from flows.outcome import RunOutcome, summarise


class Training:
    """One command that trains.

    Args:
        fresh: begin new run folders.
        verbose: show Prefect's log lines.
        words: the command line, for the message that says how to resume.
        if_busy: what to do about a run that another process has in work.
    """

    def __init__(self, fresh: bool, verbose: bool, words: Sequence[str], if_busy: IfBusy = "follow") -> None:
        self._fresh = fresh
        self._verbose = verbose
        self._words = words
        self._if_busy = if_busy
        self._trains_here = True

    def run(self, file: str, overrides: Sequence[str]) -> int:
        """Train one run; return the exit code."""
        _refuse_lists(overrides)
        config = Config.load(file, overrides)
        self._fresh = self._fresh or config.fast_dev_run is not None  # it is asked for to see it happen
        console = RunConsole(config)
        ending = self._call(
            [config],
            1,
            console,
            lambda configs: _Flows().run(
                configs[0], fresh=self._fresh, if_busy=self._if_busy, return_state=True
            ),
        )
        return self._conclude(ending, 1)

    def experiment(self, file: str, overrides: Sequence[str], sweep: Sequence[str]) -> int:
        """Train the runs of one experiment; return the exit code."""
        swept, single = _apart(sweep)
        overrides = [*overrides, *single]
        _refuse_lists(overrides)
        spec = ExperimentSpec.load(file, overrides, swept)
        return self._several(
            spec.configs(),
            self._slots(spec),
            f"Leaderboard of {spec.configs()[0].experiment_name}",
            lambda configs: _Flows().experiment(spec, self._fresh, self._if_busy, return_state=True),
        )

    def group(self, file: str, overrides: Sequence[str]) -> int:
        """Train the experiments of a group; return the exit code."""
        _refuse_lists(overrides)
        spec = GroupSpec.load(file, overrides)
        return self._several(
            [config for plan in spec.configs() for config in plan.configs],
            self._slots(spec),
            f"Leaderboard of {spec.group}",
            lambda configs: _Flows().group(spec, self._fresh, self._if_busy, return_state=True),
        )

    def _slots(self, spec: FanOut) -> int:
        """Return how many launchers a session needs. Raises ConfigError where an API is needed and none is there."""
        self._trains_here = spec.executor == "local"
        is_gated = isinstance(spec, GroupSpec) and len(spec.parts()) > 1
        if not self._trains_here or is_gated:
            from flows.cli_deploy import configured_api

            configured_api()
        return spec.local_slots

    def _several(
        self, configs: list[Config], slots: int, title: str, flow: Callable[[list[Config]], Any]
    ) -> int:
        self._fresh = self._fresh or any(config.fast_dev_run is not None for config in configs)
        ending = self._call(configs, slots, GroupConsole(configs), flow)
        if ending.outcomes:
            print()
            print_table(leaderboard(ending.outcomes), title)
        return self._conclude(ending, len(configs))

    def _call(
        self,
        configs: list[Config],
        slots: int,
        console: RunConsole | GroupConsole,
        flow: Callable[[list[Config]], Any],
    ) -> SessionEnd:
        survive_a_closed_console()
        session = Session(configs, slots, console, self._verbose, self._fresh, self._trains_here)
        with console.showing():
            return session.call(flow)

    def _conclude(self, ending: SessionEnd, total: int) -> int:
        """Print what did not go well to stderr, a rank's traceback last; return the exit code."""
        code = self._report(ending, total)
        if ending.is_api_lost:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # Prefect would try for minutes to send what it holds
        return code

    def _report(self, ending: SessionEnd, total: int) -> int:
        bad = [outcome for outcome in ending.outcomes if outcome.status in ("failed", "refused")]
        stopped = [outcome for outcome in ending.outcomes if outcome.status == "interrupted"]
        if ending.is_api_lost:
            _say("the Prefect API went away: it shows less than was trained; the run folders have it all")
        elif ending.error is not None:
            _say(f"Prefect: {type(ending.error).__name__}: {ending.error}")
        if ending.failure is not None:
            return _report_failure(ending.failure)
        if len(ending.outcomes) == total and not bad and not stopped:
            return DONE
        if ending.is_ctrl_c or ((stopped or ending.signal is not None) and not bad):
            self._say_how_to_resume(stopped, ending.outcomes)
            return INTERRUPTED if ending.is_ctrl_c else RESUMABLE
        if bad:
            if all(each.is_bad_input for each in bad):
                _say(summarise(bad, total) if total > 1 else f"{bad[0].key}: {bad[0].error}")
                _say(
                    str(bad[0].traceback).rstrip() if self._verbose else "--verbose shows where it was raised"
                )
                return BAD_INPUT
            _say(summarise(bad, total) if total > 1 else f"{bad[0].key} failed: {bad[0].error}")
            if bad[0].traceback:
                print(f"\n{bad[0].key}, rank {bad[0].rank}:\n{bad[0].traceback.rstrip()}", file=sys.stderr)
        return FAILED

    def _say_how_to_resume(self, stopped: Sequence[RunOutcome], outcomes: Sequence[RunOutcome]) -> None:
        """Print the command that resumes.

        With `--fresh` it would begin anew what has begun; without it, it does not begin anew what has not.
        """
        is_begun = any(outcome.folder for outcome in outcomes)
        words = [word for word in self._words if word != "--fresh" or not is_begun]
        _say(f"interrupted; to resume: {shlex.join(['danling', *words])}")
        waiting = ", ".join(outcome.name for outcome in stopped if outcome.folder is None)
        if self._fresh and is_begun and waiting:
            _say(f"not begun yet, and where complete from before not trained anew by that command: {waiting}")


def _refuse_lists(overrides: Sequence[str]) -> None:
    """ConfigError for `params.lr=1e-3,3e-3` or `params.opt=adam,sgd`: one run takes one value, this would be a text."""
    for word in overrides:
        key, _, value = word.partition("=")
        if re.fullmatch(r"[\w.+-]+(,[\w.+-]+)+", value.strip()):
            raise ConfigError(
                f"override {key!r}: {value!r} is several values, and a run takes one; to train each: "
                f"danling experiment FILE --sweep {word} (a list is written {key}=[{value}], "
                f"a text {key}='\"{value}\"')"
            )


def _apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words behind `--sweep` that list values, and those of one value, which vary nothing: overrides.

    Where none lists values, all are the sweep.
    """
    parse_sweep(words)  # a key that comes twice is refused before the words are sorted
    ones = [word for word in words if all(len(values) == 1 for values in parse_sweep([word]).values())]
    swept = [word for word in words if word not in ones]
    return (swept, ones) if swept else (ones, [])


class _Flows:
    """The flows, imported when they are called: with them comes Prefect."""

    def __init__(self) -> None:
        from flows.experiment import experiment
        from flows.group import group
        from flows.run import run

        self.run, self.experiment, self.group = run, experiment, group


def _report_failure(failure: BaseException) -> int:
    """Say why no run was even begun: in one line, where the error is one of ours."""
    if not isinstance(failure, DanLingError):
        print("".join(traceback.format_exception(failure)).rstrip(), file=sys.stderr)
    _say(str(failure) or type(failure).__name__)
    return BAD_INPUT if isinstance(failure, ConfigError) else FAILED


def _say(message: str) -> None:
    say(f"danling: {message}", file=sys.stderr)
