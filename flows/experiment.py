"""The flow of an experiment: the runs of one code, each a flow of its own under this one."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run as runtime

from danling_core.config import Config
from danling_core.config.sweep import ExperimentSpec
from danling_core.errors import ConfigError, RunInterrupted
from flows.busy import IfBusy
from flows.cancellation import heeding_cancel
from flows.credentials import store_credentials
from flows.deployment_runs import run_by_deployment
from flows.endings import conclude_all
from flows.fan_out import call_all, nested
from flows.flow_call import FlowCall, FlowCalls
from flows.lateness import say_if_late
from flows.leaderboard import leaderboard, markdown
from flows.lineage import in_flow_run
from flows.naming import run_display_name, tags_of
from flows.outcome import Ending, RunOutcome
from flows.parameters import refuse_other_ids
from flows.pool import LauncherPool, launcher_pool
from flows.run import run
from flows.skipping import complete_already
from flows.training import open_and_train
from flows.view import FlowView, RunView
from tasks.artifacts import FlowArtifacts
from tasks.reporter import reporting

logger = logging.getLogger("danling.flows")

_PATIENCE_SECONDS = 0.5  # in which a flow's body should begin
_FAREWELL_SECONDS = 10.0  # in which flow runs should end, when all runs have


def _flow_run_name() -> str:
    spec = runtime.get_parameters()["spec"]
    with contextlib.suppress(ConfigError):  # the flow's body raises it, where it has a message
        return str(spec.configs()[0].experiment_name)
    return "experiment"


@flow(name="experiment", flow_run_name=_flow_run_name, persist_result=False)
def experiment(
    spec: ExperimentSpec, fresh: bool = False, if_busy: IfBusy = "follow", expected_id: str = ""
) -> State[list[dict[str, Any]]]:
    """Train the runs of one experiment, `concurrency` at a time; ends in a leaderboard.

    Every run is validated before the first one starts. A run that fails does not stop the others.

    Args:
        spec: a config, and what varies in it.
        fresh: begin new run folders, whatever is there. A retry of this flow run goes on with the folders that it made.
        if_busy: as for `run`.
        expected_id: as for `run`: 8 digits, since each run has its own.
    """
    configs = spec.configs()
    with (
        in_flow_run(),
        store_credentials(configs),
        launcher_pool(min(spec.local_slots, len(configs)), spec.executor == "local") as pool,
        reporting() as reporter,
        pool.apart() as interrupt,
        heeding_cancel(interrupt),
    ):
        say_if_late()
        artifacts = FlowArtifacts(reporter)
        refuse_other_ids(pool.prepare(configs), expected_id)
        tags = tags_of(configs[0])
        artifacts.tag(tags)
        with nested(tags):
            if spec.executor == "deployment":
                outcomes = run_by_deployment(spec, configs, pool, fresh, if_busy)
            else:
                outcomes = run_all(prepared_configs(configs, pool), pool, fresh, if_busy)
        rows = leaderboard(outcomes)
        title = f"Experiment {configs[0].experiment_name}"
        artifacts.markdown(f"leaderboard-{configs[0].experiment_name}", markdown(rows, title), title)
    return conclude_all(rows, outcomes)


def prepared_configs(configs: Sequence[Config], pool: LauncherPool) -> list[Config]:
    """Return the config of each run, complete and with its code stated."""
    return [plan.config for plan in pool.prepare(configs)]


def run_all(
    configs: list[Config], pool: LauncherPool, fresh: bool, if_busy: IfBusy = "follow"
) -> list[RunOutcome]:
    """Train each run in a flow of its own, as many at a time as there are slots; how they ended, in order."""
    if not fresh and (complete := complete_already(pool.prepare(configs))) is not None:
        return [pool.record(outcome) for outcome in complete]
    pool.start(all_of_them=True)
    outcomes: list[RunOutcome | None] = [None] * len(configs)
    flows = FlowCalls()

    def call(index: int) -> None:
        outcomes[index] = _run_one(configs[index], pool, flows, fresh, if_busy)

    call_all([lambda index=index: call(index) for index in range(len(configs))], pool.slots, pool)  # type: ignore[misc]
    flows.join(_FAREWELL_SECONDS)
    return [outcome for outcome in outcomes if outcome is not None]


def _run_one(
    config: Config, pool: LauncherPool, flows: FlowCalls, fresh: bool, if_busy: IfBusy
) -> RunOutcome:
    """Call the run's flow once there is a slot for it; return its outcome, whatever reached Prefect.

    A run that is complete needs no flow: the flow around it lists it.
    """
    if not fresh and (found := complete_already(pool.prepare([config]))) is not None:
        return pool.record(found[0])
    try:
        with pool.slot(), pool.apart():
            call = flows.begin(lambda: run(config, fresh=fresh, if_busy=if_busy, return_state=True))
            call.wait_until_taken(_PATIENCE_SECONDS)
            if call.take():
                return _train_unseen(config, pool, call, fresh, if_busy)
            outcome = call.wait_until_ended()
            return outcome or pool.record(not_started(config, "failed", call.why_no_end()))
    except RunInterrupted as error:
        return pool.record(not_started(config, "interrupted", str(error)))


def _train_unseen(
    config: Config, pool: LauncherPool, call: FlowCall, fresh: bool, if_busy: IfBusy
) -> RunOutcome:
    """Train a run whose flow has not begun: training does not depend on who watches.

    A flow that begins later shows the run all the same. Where Prefect could make none, the flow around it does.
    """
    if call.state is not None:  # it ended before its body began, as where it was cancelled
        ending: Ending = "interrupted" if call.state.is_cancelled() else "failed"
        return call.end(pool.record(not_started(config, ending, call.state.message)))
    with reporting() as reporter:
        view: RunView = call.late_view
        if call.error is not None:
            logger.warning("Prefect lost sight of %s: %s", config.run_name, call.why_no_end())
            view = FlowView(FlowArtifacts(reporter))
        try:
            return call.end(pool.record(open_and_train(config, pool, view, fresh, if_busy)))
        except BaseException as error:
            call.end(not_started(config, "failed", f"{type(error).__name__}: {error}"))
            raise


def not_started(config: Config, status: Ending, error: str | None) -> RunOutcome:
    """Return the outcome of a run that did not come as far as a folder."""
    return RunOutcome(
        status=status,
        name=run_display_name(config),
        id="",
        experiment_name=config.experiment_name,
        run_name=config.run_name,
        group=config.group,
        error=error,
    )
