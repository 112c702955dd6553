"""The flow of one run: prepare, seed, train and evaluate under observation, score, store."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run as runtime

import flows.own_names  # noqa: F401
from danling_core import storage
from danling_core.config import Config
from danling_core.errors import ConfigError
from danling_core.runs.folder import RunFolder
from flows.busy import IfBusy
from flows.cancellation import heeding_cancel
from flows.credentials import store_credentials
from flows.curves import curves_image
from flows.endings import conclude_run
from flows.flow_call import flow_call
from flows.lateness import say_if_late
from flows.lineage import in_flow_run
from flows.naming import run_display_name, tags_of
from flows.outcome import RunOutcome
from flows.page import epoch_rows, run_page
from flows.parameters import Overrides, refuse_other_ids
from flows.pool import launcher_pool
from flows.training import open_and_train
from flows.view import FlowView
from tasks.artifacts import FlowArtifacts
from tasks.reporter import reporting


def _flow_run_name() -> str:
    parameters = runtime.get_parameters()
    with contextlib.suppress(ConfigError):  # the flow's body raises it, where it has a message
        return run_display_name(_effective(parameters["config"], parameters.get("overrides")))
    return run_display_name(parameters["config"])


@flow(name="run", flow_run_name=_flow_run_name, persist_result=False)
def run(
    config: Config,
    overrides: Overrides = {},  # noqa: B006 - Prefect copies it; null would hide the schema's own message
    fresh: bool = False,
    if_busy: IfBusy = "follow",
    expected_id: str = "",
) -> State[dict[str, Any]]:
    """Train and evaluate one run; when it is complete already, return what it left.

    Args:
        config: the run.
        overrides: dotted changes of the config, such as `{"params.lr": 0.01}`.
        fresh: begin a new run folder, whatever is there. A retry of this flow run goes on with the folder that it made.
        if_busy: what to do where another process has the run in work: follow it, wait for its end and go on then, or
            fail.
        expected_id: what the run's id must begin with, to be refused otherwise: 8 digits name the code, all 16 the
            config too. Empty: any.
    """
    config = _effective(config, overrides)
    with (
        in_flow_run(),
        store_credentials([config]),
        launcher_pool() as pool,
        reporting() as reporter,
        storage.using(config.storage_options),
        heeding_cancel(pool.interrupter()),
    ):
        say_if_late()
        artifacts = FlowArtifacts(reporter)
        artifacts.tag(tags_of(config))
        view = FlowView(artifacts)
        [plan] = pool.prepare([config])
        refuse_other_ids([plan], expected_id)
        code = plan.identity.experiment_id
        get_run_logger().info("code %s, in %s on %s", code, os.getcwd(), socket.gethostname())
        call = flow_call()
        if call is None or call.take():
            outcome = pool.record(open_and_train(config, pool, view, fresh, if_busy))
            if call is not None:
                call.end(outcome)
        else:  # it has begun without this flow, which was late
            call.late_view.replay(plan, view)
            outcome = call.outcome()
        page = run_page(outcome, code, _picture(outcome))
        artifacts.markdown(f"run-{outcome.key}", page, "The run, its curves and files")
        if outcome.traceback:
            get_run_logger().error("rank %s failed:\n%s", outcome.rank, outcome.traceback)
    return conclude_run(outcome)


def _picture(outcome: RunOutcome) -> str | None:
    """Return the picture of the run's curves; None where its results cannot be read."""
    if outcome.folder is None:
        return None
    return curves_image(epoch_rows(RunFolder(outcome.folder)))


def _effective(config: Config, overrides: dict[str, Any] | None) -> Config:
    return config.override(overrides) if overrides else config
