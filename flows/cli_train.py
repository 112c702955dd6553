"""`danling run`, `experiment`, `group`: load and validate, train under the flow, report how it ended."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence

from danling_core.config import Config
from danling_core.config.overrides import parse_sweep
from danling_core.config.sweep import ExperimentSpec, GroupSpec
from danling_core.errors import ConfigError, DanLingError
from flows.cli_session import Ending, Session
from flows.cli_table import print_table
from flows.console import GroupConsole, RunConsole
from flows.exit_codes import BAD_INPUT, DONE, FAILED, INTERRUPTED, RESUMABLE
from flows.leaderboard import leaderboard
from flows.outcome import RunOutcome, summarise


def run(arguments: argparse.Namespace) -> int:
    """Train one run."""
    _refuse_lists(arguments.overrides)
    config = Config.load(arguments.file, arguments.overrides)
    console = RunConsole(config)
    session = Session([config], 1, console, arguments.verbose, arguments.fresh)
    with console.showing():
        ending = session.call(
            lambda configs: _Flows().run(configs[0], fresh=arguments.fresh, return_state=True)
        )
    return _conclude(ending, 1, arguments)


def experiment(arguments: argparse.Namespace) -> int:
    """Train the runs of one experiment."""
    sweep, overrides = _apart(arguments.sweep)
    overrides = [*arguments.overrides, *overrides]
    _refuse_lists(overrides)
    spec = ExperimentSpec.load(arguments.file, overrides, sweep)
    configs = spec.configs()
    console = GroupConsole(configs)
    session = Session(configs, spec.concurrency, console, arguments.verbose, arguments.fresh)
    with console.showing():
        ending = session.call(lambda configs: _Flows().experiment(spec, arguments.fresh, return_state=True))
    _print_leaderboard(ending.outcomes, f"Leaderboard of {configs[0].experiment_name}")
    return _conclude(ending, len(configs), arguments)


def group(arguments: argparse.Namespace) -> int:
    """Train the experiments of a group."""
    _refuse_lists(arguments.overrides)
    spec = GroupSpec.load(arguments.file, arguments.overrides)
    configs = [config for plan in spec.configs() for config in plan.configs]
    console = GroupConsole(configs)
    session = Session(configs, spec.concurrency, console, arguments.verbose, arguments.fresh)
    with console.showing():
        ending = session.call(lambda configs: _Flows().group(spec, arguments.fresh, return_state=True))
    _print_leaderboard(ending.outcomes, f"Leaderboard of {spec.group}")
    return _conclude(ending, len(configs), arguments)


def _refuse_lists(overrides: Sequence[str]) -> None:
    """ConfigError for `params.lr=1e-3,3e-3`: one run takes one value, and this would be a text."""
    for word in overrides:
        key, _, value = word.partition("=")
        if re.fullmatch(r"[-+.\de]+(,[-+.\de]+)+", value.strip()):
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


def _print_leaderboard(outcomes: Sequence[RunOutcome], title: str) -> None:
    if outcomes:
        print()
        print_table(leaderboard(outcomes), title)


def _conclude(ending: Ending, total: int, arguments: argparse.Namespace) -> int:
    """Say on stderr what did not go well, a rank's traceback last; the exit code."""
    code = _report(ending, total, arguments)
    if ending.is_api_lost:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # Prefect would try for minutes to send what it holds
    return code


def _report(ending: Ending, total: int, arguments: argparse.Namespace) -> int:
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
    if ending.is_ctrl_c or (stopped and not bad):
        _say_how_to_resume(stopped, ending.outcomes, arguments)
        return INTERRUPTED if ending.is_ctrl_c else RESUMABLE
    if bad:
        _say(summarise(bad, total) if total > 1 else f"{bad[0].key} failed: {bad[0].error}")
        if bad[0].traceback:
            print(f"\n{bad[0].key}, rank {bad[0].rank}:\n{bad[0].traceback.rstrip()}", file=sys.stderr)
    return FAILED


def _report_failure(failure: BaseException) -> int:
    """Say why no run was even begun: in one line, where the error is one of ours."""
    if not isinstance(failure, DanLingError):
        print("".join(traceback.format_exception(failure)).rstrip(), file=sys.stderr)
    _say(str(failure) or type(failure).__name__)
    return BAD_INPUT if isinstance(failure, ConfigError) else FAILED


def _say_how_to_resume(
    stopped: Sequence[RunOutcome], outcomes: Sequence[RunOutcome], arguments: argparse.Namespace
) -> None:
    """The command that resumes. `--fresh` would begin anew what has begun, and without it what has not begun
    is not anew."""
    is_begun = any(outcome.folder for outcome in outcomes)
    words = [word for word in arguments.words if word != "--fresh" or not is_begun]
    _say(f"interrupted; to resume: {shlex.join(['danling', *words])}")
    waiting = ", ".join(outcome.name for outcome in stopped if outcome.folder is None)
    if arguments.fresh and is_begun and waiting:
        _say(f"not begun yet, and where complete from before not trained anew by that command: {waiting}")


def _say(message: str) -> None:
    print(f"danling: {message}", file=sys.stderr)
