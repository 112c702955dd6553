"""`danling deploy`: deployments of a project of one's own, by a `prefect.yaml` that is written once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from danling_core.config import Config, documents
from danling_core.config.sweep import ExperimentSpec, GroupSpec
from danling_core.errors import ConfigError, DanLingError
from flows.cli_text import say
from flows.exit_codes import DONE

FILE = "prefect.yaml"
_HEAD = """\
# Deployments of this project, written by `danling deploy` and yours from now on: it is not written again.
#   prefect --no-prompt deploy --all      registers what stands here
"""


class DeployError(DanLingError):
    """Prefect refused a deployment; the message ends with what it said."""


def deploy(files: Sequence[str], pool: str, is_example: bool, is_pinned: bool = False) -> int:
    """Write `prefect.yaml` in the current folder unless there is one, make pool and automation, and register it all."""
    if is_pinned and Path(FILE).exists():
        raise ConfigError(
            f"--pin is for a {FILE} that is about to be written, and there is one: set expected_id in it by hand"
        )
    document = None if is_example else _document(files, pool)
    api_url = configured_api()  # before anything is written: the same command is given again then
    if is_example:
        files = [_write_example(name) for name in ("toy.py", "toy.yaml")][1:]
        document = None if Path(FILE).exists() else _document(files, pool)
    if document is not None and is_pinned:
        for file, entry in zip(files, document["deployments"], strict=True):
            entry["parameters"]["expected_id"] = _code_of(file)
    if document is not None:
        Path(FILE).write_text(_HEAD + yaml.safe_dump(document, sort_keys=False, width=110))
        say(f"wrote {FILE}")
    ensure_pool(pool)
    ensure_automation()
    names = register()
    say(f"deployed to {api_url}: {', '.join(names)}")
    say("\nnext")
    say(
        f"  PREFECT_WORKER_QUERY_SECONDS=1 prefect worker start --pool {pool}      a worker, in a terminal of its own"
    )
    say(f"  prefect deployment run {names[0]} --watch")
    say(f"  prefect deployment schedule create {names[0]} --cron '0 2 * * *' --timezone UTC")
    return DONE


def configured_api() -> str:
    """Return the URL of the API that Prefect's settings name. Raises ConfigError where it cannot be used."""
    from prefect.settings import PREFECT_API_URL

    from flows.server import why_unusable

    url = PREFECT_API_URL.value()
    if url is None:
        raise ConfigError(
            "no Prefect API is configured: `danling up` starts one, or name yours: "
            "prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    if (reason := why_unusable(str(url))) is not None:
        raise ConfigError(
            f"PREFECT_API_URL is {url}, which cannot be used ({reason}): start it, or name another"
        )
    return str(url)


def ensure_pool(name: str) -> bool:
    """Make the process work pool unless there is one of its name; return whether it was made."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            found = client.read_work_pool(name)
        except ObjectNotFound:
            prefect("work-pool", "create", name, "--type", "process")
            return True
    if found.is_paused:
        say(
            f"the work pool {name!r} is paused: its runs wait for `prefect work-pool resume {name}`",
            file=sys.stderr,
        )
    return False


def ensure_automation() -> bool:
    """Make the automation that ends silent runs unless there is one of its name; return whether it was made."""
    from prefect.client.orchestration import get_client

    template = resources.files("flows") / "templates" / "silent-runs.yaml"
    [wanted] = yaml.safe_load(template.read_text())["automations"]
    with get_client(sync_client=True) as client:
        known = client.request("POST", "/automations/filter", json={}).json()
        if wanted["name"] in [each["name"] for each in known]:
            return False
    with resources.as_file(template) as path:
        prefect("automation", "create", "--from-file", str(path))
    return True


def register() -> list[str]:
    """Register the deployments of `prefect.yaml`; return their names, `flow/name`."""
    document = documents.as_mapping(documents.parse_yaml(Path(FILE).read_text(), FILE), FILE)
    listed = document.get("deployments") or []
    if not listed:
        raise ConfigError(
            f"{FILE} lists no deployments: remove it, and name files, such as: danling deploy run.yaml"
        )
    prefect("--no-prompt", "deploy", "--all")
    return [
        f"{str(each['entrypoint']).replace(':', '.').rpartition('.')[2]}/{each['name']}" for each in listed
    ]


def prefect(*words: str) -> str:
    """Run a command of Prefect's. Raises `DeployError` with what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *words],
        env={**os.environ, "PWD": os.getcwd()},  # which prefect.yaml names, and only a shell keeps right
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise DeployError(f"`prefect {' '.join(words)}` failed: {' '.join(said[-3:])}")
    return done.stdout


def _write_example(name: str) -> str:
    if not Path(name).exists():
        Path(name).write_text((resources.files("flows") / "templates" / name).read_text())
        say(f"wrote {name}")
    return name


def _document(files: Sequence[str], pool: str) -> dict[str, Any] | None:
    """Return what is to be written, once every file is valid; None where there is a `prefect.yaml` to register.

    Raises:
        ConfigError: a file is not valid; there are neither files nor a `prefect.yaml`, or both.
    """
    if Path(FILE).exists():
        if files:
            raise ConfigError(
                f"{FILE} is there, and is not written again: add deployments by hand, or remove it"
            )
        return None
    if not files:
        raise ConfigError(
            f"there is no {FILE} here: name the files of your runs, experiments and groups (danling deploy run.yaml), "
            "or try danling deploy --example"
        )
    return {
        "name": Path.cwd().name,
        "pull": [{"prefect.deployments.steps.set_working_directory": {"directory": "{{ $PWD }}"}}],
        "deployments": [deployment_of(file, pool) for file in files],
    }


def _code_of(file: str) -> str:
    """Return the first eight digits of the ids of the runs in a file: their code. Raises ConfigError."""
    from flows.pool import LauncherPool, launcher_for_elsewhere

    pool = LauncherPool(launcher=launcher_for_elsewhere)
    try:
        codes = sorted({plan.identity.id[:8] for plan in pool.prepare(_configs_of(file))})
    finally:
        pool.close()
    if len(codes) > 1:
        raise ConfigError(
            f"{file}: its runs have several codes, {', '.join(codes)}, and only one can be pinned"
        )
    return codes[0]


def _configs_of(file: str) -> list[Config]:
    _, _, loaded = _kind_of(file)
    spec = loaded.load(file)
    if isinstance(spec, GroupSpec):
        return [config for plan in spec.configs() for config in plan.configs]
    return spec.configs() if isinstance(spec, ExperimentSpec) else [spec]


def _kind_of(file: str) -> tuple[str, str, type[Config] | type[ExperimentSpec] | type[GroupSpec]]:
    """Return the flow of a file, the parameter that takes its content, and what loads it."""
    value = documents.as_mapping(documents.parse_yaml(documents.read_text(file), file), file)
    if "experiments" in value:
        return "group", "spec", GroupSpec
    if {"config", "sweep", "runs"} & value.keys():
        return "experiment", "spec", ExperimentSpec
    return "run", "config", Config


def deployment_of(file: str, pool: str) -> dict[str, Any]:
    """Return the entry of one file, once it is valid. Raises ConfigError."""
    kind, parameter, loaded = _kind_of(file)
    stated = loaded.load(file).model_dump(mode="json", exclude_unset=True)
    return {
        "name": Path(file).stem,
        "entrypoint": f"danling_flows.{kind}",
        "parameters": {parameter: stated},
        "work_pool": {
            "name": pool,
            "job_variables": {
                "stream_output": False,
                "env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"},
            },
        },
        "schedules": [],
    }
