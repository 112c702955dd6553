"""The flow of a group: experiments with something in common, ending in one leaderboard."""

from __future__ import annotations

import logging
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from danling_core.config import Config
from danling_core.config.sweep import ExperimentSpec, GroupSpec
from flows.approval import why_not_approved
from flows.busy import IfBusy
from flows.cancellation import heeding_cancel
from flows.credentials import store_credentials
from flows.deployment_runs import run_by_deployment
from flows.endings import conclude_all
from flows.experiment import experiment, not_started, prepared_configs, run_all
from flows.fan_out import call_all, nested
from flows.lateness import say_if_late
from flows.leaderboard import leaderboard, markdown
from flows.lineage import in_flow_run
from flows.naming import tags_of
from flows.outcome import Ending, RunOutcome
from flows.parameters import refuse_other_ids
from flows.pool import LauncherPool, launcher_pool
from flows.skipping import complete_already
from tasks.artifacts import FlowArtifacts
from tasks.reporter import reporting

logger = logging.getLogger("danling.flows")


@flow(name="group", flow_run_name="{spec.group}", persist_result=False)
def group(
    spec: GroupSpec, fresh: bool = False, if_busy: IfBusy = "follow", expected_id: str = ""
) -> State[list[dict[str, Any]]]:
    """Train several experiments, `concurrency` runs at a time over all of them; ends in a leaderboard.

    Every run of every experiment is validated before the first one starts.

    Args:
        spec: the experiments.
        fresh: begin new run folders, whatever is there. A retry of this flow run goes on with the folders that it made.
        if_busy: as for `run`.
        expected_id: as for `run`: 8 digits, since each run has its own.
    """
    configs = [config for plan in spec.configs() for config in plan.configs]
    with (
        in_flow_run(),
        store_credentials(configs),
        launcher_pool(min(spec.local_slots, len(configs)), spec.executor == "local") as pool,
        reporting() as reporter,
        heeding_cancel(pool.interrupt),
    ):
        say_if_late()
        artifacts = FlowArtifacts(reporter)
        refuse_other_ids(pool.prepare(configs), expected_id)
        tags = [tag for tag in tags_of(configs[0]) if not tag.startswith("experiment:")]
        artifacts.tag(tags)
        with nested(tags):
            outcomes = _run_parts(spec, pool, fresh, if_busy)
        rows = leaderboard(outcomes)
        artifacts.markdown(f"leaderboard-{spec.group}", markdown(rows, f"Group {spec.group}"), "Leaderboard")
        artifacts.table(f"leaderboard-table-{spec.group}", rows, f"Leaderboard of the group {spec.group}")
    return conclude_all(rows, outcomes)


def _run_parts(spec: GroupSpec, pool: LauncherPool, fresh: bool, if_busy: IfBusy) -> list[RunOutcome]:
    """Run one part of the group after the other; between two of them stands an approval."""
    plans = spec.configs()
    outcomes: list[RunOutcome] = []
    refusal: str | None = None
    for part in spec.parts():
        configs = [config for index in part for config in plans[index].configs]
        approval = spec.experiments[part[0]].approval
        if refusal is None and approval is not None and _is_to_train(configs, pool, fresh):
            refusal = why_not_approved(approval, plans[part[0]].name, pool)
        if refusal is not None:
            outcomes += [pool.record(not_started(config, "interrupted", refusal)) for config in configs]
        elif spec.executor == "deployment":
            outcomes += run_by_deployment(spec, configs, pool, fresh, if_busy)
        else:
            experiments = [_in_group(spec.experiments[index], spec.group) for index in part]
            outcomes += _call_experiments(experiments, pool, fresh, if_busy)
    return outcomes


def _is_to_train(configs: list[Config], pool: LauncherPool, fresh: bool) -> bool:
    return fresh or complete_already(pool.prepare(configs)) is None


def _call_experiments(
    experiments: list[ExperimentSpec], pool: LauncherPool, fresh: bool, if_busy: IfBusy
) -> list[RunOutcome]:
    """Open as many experiments as there are slots: none is idle while there is work."""
    configs = [config for spec in experiments for config in spec.configs()]
    if _is_to_train(configs, pool, fresh):
        pool.start(all_of_them=True)
    ended: list[list[RunOutcome]] = [[] for _ in experiments]

    def call(index: int) -> None:
        with pool.remembering() as outcomes:
            try:
                _call_experiment(experiments[index], pool, fresh, if_busy, outcomes)
            finally:
                ended[index] = outcomes

    call_all([lambda index=index: call(index) for index in range(len(ended))], pool.slots, pool)  # type: ignore[misc]
    return [outcome for outcomes in ended for outcome in outcomes]


def _call_experiment(
    spec: ExperimentSpec, pool: LauncherPool, fresh: bool, if_busy: IfBusy, outcomes: list[RunOutcome]
) -> None:
    """Call the experiment's flow; where Prefect can make none, train its runs all the same.

    A flow that ended before its runs were called is the end of each of them.
    """
    configs = spec.configs()
    try:
        state = experiment(spec, fresh, if_busy, return_state=True)
    except Exception as error:
        name = configs[0].experiment_name
        logger.warning("Prefect lost sight of %s: %s: %s", name, type(error).__name__, error)
        if not outcomes:
            run_all(prepared_configs(configs, pool), pool, fresh, if_busy)
        return
    if not outcomes:
        status: Ending = "interrupted" if state.is_cancelled() else "failed"
        for config in configs:
            pool.record(not_started(config, status, state.message))


def _in_group(spec: ExperimentSpec, name: str) -> ExperimentSpec:
    values = {**spec.model_dump(), "overrides": {**spec.overrides, "group": name}, "approval": None}
    return ExperimentSpec(**values)
