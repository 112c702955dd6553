"""The command line `danling`. Each command imports what it needs itself: `danling runs` waits for no Prefect."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Literal

from cyclopts import CycloptsError, Parameter

from danling_core.errors import ConfigError, DanLingError, NotFound
from flows import cli_model as cli_model  # its commands
from flows import exit_codes
from flows.cli_app import (
    OVERRIDES,
    Busy,
    Endpoint,
    File,
    Fresh,
    Json,
    Overrides,
    Pool,
    Root,
    Run,
    Status,
    Verbose,
    app,
    endpoint,
)
from flows.cli_text import say
from flows.signals import StoppedBySignal


@app.command(
    help_epilogue=f"""{OVERRIDES}
examples:
  danling run examples/digits/run.yaml
  danling run examples/digits/run.yaml params.lr=0.003 seed=0 nproc_per_node=2
  danling run examples/digits/run.yaml --fresh           begin anew beside it
  danling run examples/digits/run.yaml --pdb             with a debugger, on one rank
  PREFECT_API_URL=http://127.0.0.1:4200/api danling run examples/digits/run.yaml

{exit_codes.MEANINGS}"""
)
def run(
    config: File,
    /,
    *overrides: Overrides,
    fresh: Fresh = False,
    if_busy: Busy = "follow",
    verbose: Verbose = False,
    here: Annotated[
        bool, Parameter(help="in this process and terminal, on one rank, without Prefect: for breakpoint()")
    ] = False,
    pdb: Annotated[
        bool, Parameter(help="as --here, and open the debugger where an exception is raised")
    ] = False,
) -> int:
    """Train and evaluate one run, or resume it."""
    if here or pdb:
        from flows.cli_here import run_here

        return run_here(config, overrides, fresh=fresh, debug=pdb)
    from flows.cli_train import Training

    return Training(fresh, verbose, _words, if_busy).run(config, overrides)


@app.command(
    help_epilogue=f"""{OVERRIDES}
examples:
  danling experiment examples/digits/experiment.yaml
  danling experiment examples/digits/experiment.yaml epoch_end=5
  danling experiment examples/digits/run.yaml --sweep params.lr=1e-3,3e-3 seed=0,1

{exit_codes.MEANINGS}"""
)
def experiment(
    file: File,
    /,
    *overrides: Overrides,
    sweep: Annotated[
        list[str] | None,
        Parameter(
            consume_multiple=True,
            help="train every combination of these values, key=value,value (a key with one value among them is an "
            "override); FILE is then a run's config",
        ),
    ] = None,
    fresh: Fresh = False,
    if_busy: Busy = "follow",
    verbose: Verbose = False,
) -> int:
    """Train the runs of an experiment."""
    from flows.cli_train import Training

    return Training(fresh, verbose, _words, if_busy).experiment(file, overrides, sweep or [])


@app.command(
    help_epilogue=f"""{OVERRIDES}
examples:
  danling group examples/digits/group.yaml
  danling group examples/digits/group.yaml project_root=s3://bucket/experiments

{exit_codes.MEANINGS}"""
)
def group(
    file: File,
    /,
    *overrides: Overrides,
    fresh: Fresh = False,
    if_busy: Busy = "follow",
    verbose: Verbose = False,
) -> int:
    """Train several experiments, ending in a leaderboard."""
    from flows.cli_train import Training

    return Training(fresh, verbose, _words, if_busy).group(file, overrides)


@app.command(
    help_epilogue="""\
examples:
  danling runs experiments
  danling runs s3://bucket/experiments --group digits --status failed
  danling runs experiments --json"""
)
def runs(
    root: Annotated[str, Parameter(help="project root, local or remote", show_default=True)] = "experiments",
    /,
    *,
    group: Annotated[
        str | None,
        Parameter(help="only runs trained for this group (one that was complete before keeps its own)"),
    ] = None,
    status: Annotated[Status | None, Parameter(help="only these")] = None,
    json: Json = False,
    endpoint_url: Endpoint = None,
) -> int:
    """List the runs under a project root, newest first."""
    from flows.cli_list import print_runs

    with endpoint(endpoint_url):
        return print_runs(root, group, status, json)


@app.command(
    help_epilogue="""\
examples:
  danling show digits-cnn-baseline
  danling show 0123abcd --root s3://bucket/experiments
  danling show experiments/digits-cnn-baseline-0123456789abcdef/20261121-103249-123456"""
)
def show(
    run: Run, /, *, root: Root = "experiments", json: Json = False, endpoint_url: Endpoint = None
) -> int:
    """Show one run: how it went, its results, its files."""
    from flows.cli_list import print_run

    with endpoint(endpoint_url):
        return print_run(root, run, json)


@app.command(
    help_epilogue="""\
examples:
  danling up                                             in a terminal of its own
  danling up --database postgresql+asyncpg://user:password@localhost/prefect
  danling up --write systemd                             a unit file to read and change

Prefect's own commands do the same: see deployments/README.md of the project."""
)
def up(
    *,
    port: Annotated[int, Parameter(help="of the server and its UI", show_default=True)] = 4200,
    database: Annotated[
        str | None, Parameter(help="of the server; default: SQLite, good for about four runs at a time")
    ] = None,
    pool: Pool = "danling",
    limit: Annotated[int, Parameter(help="flow runs at a time of the worker", show_default=True)] = 10,
    write: Annotated[
        Literal["systemd", "compose"] | None,
        Parameter(help="start nothing: write danling.service or compose.yaml into this folder"),
    ] = None,
) -> int:
    """Start server, work pool, worker and this project's deployments on this machine."""
    if write is not None:
        from flows.services import write as write_service

        return write_service(write)
    from flows.up import up as bring_up

    return bring_up(port, database, pool, limit)


@app.command(
    help_epilogue="""\
examples:
  danling deploy run.yaml group.yaml       writes prefect.yaml once, and registers it
  danling deploy                           registers the prefect.yaml of this folder
  danling deploy run.yaml --pin            the deployment runs the code of now only
  danling deploy --example                 a small project to begin with"""
)
def deploy(
    *files: Annotated[str, Parameter(help="a run's, an experiment's or a group's file each")],
    pool: Pool = "danling",
    example: Annotated[bool, Parameter(help="write toy.py and toy.yaml, and deploy these")] = False,
    pin: Annotated[
        bool,
        Parameter(help="write that they run the code of now, and are refused where a worker has other code"),
    ] = False,
) -> int:
    """Make deployments of this folder's runs, experiments and groups."""
    from flows.cli_deploy import deploy as deploy_files

    return deploy_files(files, pool, example, pin)


@app.command(
    help_epilogue="""\
examples:
  danling stop digits-cnn-baseline
  danling stop digits-lr --root s3://bucket/experiments      every run of a group that is at work

The request is left in the run's folder, so it works from any machine, and without
a Prefect API. The owner of the run sees it within 5 s, saves, and ends with exit
code 75; `danling resume` goes on."""
)
def stop(
    run: Annotated[str, Parameter(help="a run's name, id or folder, or a group's name")],
    /,
    *,
    root: Root = "experiments",
    wait: Annotated[
        float, Parameter(help="seconds to wait for the end; 0: do not", show_default=True)
    ] = 120.0,
    endpoint_url: Endpoint = None,
) -> int:
    """Have a run, or all of a group, save and stop."""
    from flows.cli_operations import stop_runs

    with endpoint(endpoint_url):
        return stop_runs(root, run, wait)


@app.command(
    help_epilogue="""\
examples:
  danling resume digits-cnn-baseline
  danling resume 0123abcd --root s3://bucket/experiments
  danling resume digits-cnn-baseline --here      not as a flow run of its deployment

A run that a deployment has begun is resumed by a retry of its flow run, where the
Prefect API that is configured knows it; every other one in this terminal, by the
config in its folder."""
)
def resume(
    run: Run,
    /,
    *,
    root: Root = "experiments",
    here: Annotated[bool, Parameter(help="in this terminal, whoever began it")] = False,
    verbose: Verbose = False,
) -> int:
    """Go on with a run that was stopped, failed or lost its process."""
    from flows.cli_operations import resume_run

    return resume_run(root, run, here, verbose)


@app.command(
    help_epilogue="""\
examples:
  danling doctor
  danling doctor s3://bucket/experiments"""
)
def doctor(
    root: Annotated[str, Parameter(help="project root", show_default=True)] = "experiments",
    /,
    *,
    endpoint_url: Endpoint = None,
) -> int:
    """Find runs whose process is gone or silent, and set the flow runs of the dead to Crashed."""
    from flows.cli_operations import examine

    with endpoint(endpoint_url):
        return examine(root)


@app.command(help_epilogue="examples:\n  danling keys\n  danling keys checkpoint")
def keys(text: Annotated[str, Parameter(help="only those in which this occurs")] = "", /) -> int:
    """List the keys of a config, with defaults and meanings."""
    from flows.cli_keys import print_keys

    return print_keys(text)


@app.command(
    help_epilogue="""\
examples:
  danling approve                               which groups wait
  danling approve nightly --note "looks good"
  danling approve nightly --no                  what is left is not begun"""
)
def approve(
    group: Annotated[str, Parameter(help="name of the group, or id of its flow run")] = "",
    /,
    *,
    no: Annotated[bool, Parameter(help="decline", negative="")] = False,
    note: Annotated[str, Parameter(help="for who reads the log")] = "",
) -> int:
    """Answer a group that waits for an approval."""
    from flows.cli_approve import approve as answer

    return answer(group, no, note)


@app.command(
    help_epilogue="""\
examples:
  danling notify https://hooks.slack.com/services/...     or any webhook that takes JSON
  danling notify - < file-with-the-url
  danling notify off

What is sent is {"text": ..., "subject": ..., "body": ...}: who failed, or what a
group's best runs are, and a link. The URL is kept in Prefect as a secret of the
block custom-webhook/danling."""
)
def notify(
    url: Annotated[str, Parameter(help="of a webhook; - reads it from standard input; off ends it")], /
) -> int:
    """Have Prefect send a message when a run fails or crashes, and when a group ends."""
    from flows.cli_notify import notify as notify_by

    return notify_by(url)


@app.command(
    help_epilogue="""\
examples:
  danling pull digits-cnn-baseline experiments --root s3://bucket/experiments
  danling pull s3://bucket/experiments/digits-cnn-baseline-0123456789abcdef experiments

The run comes to DIR/{name}-{id}/{timestamp}, so DIR is a project root: `danling
runs DIR` lists it. Called again after an interruption it goes on where it
stopped."""
)
def pull(
    run: Run,
    dir: Annotated[str, Parameter(help="local project root to put it under")],
    /,
    *,
    root: Root = "experiments",
    endpoint_url: Endpoint = None,
) -> int:
    """Copy a run from a store to a local folder."""
    from flows.cli_storage import pull_run

    with endpoint(endpoint_url):
        return pull_run(root, run, dir)


@app.command(
    help_epilogue="""\
examples:
  danling push experiments/digits-cnn-baseline-0123456789abcdef s3://bucket/experiments
  danling push experiments gs://bucket/experiments          every run under a root"""
)
def push(
    dir: Annotated[str, Parameter(help="a run's folder, or a project root")],
    url: Annotated[str, Parameter(help="project root to put it under: s3://bucket/experiments")],
    /,
    *,
    endpoint_url: Endpoint = None,
) -> int:
    """Copy a local run, or all under a root, to a store."""
    from flows.cli_storage import push_runs

    with endpoint(endpoint_url):
        return push_runs(dir, url)


@app.command(
    help_epilogue="""\
examples:
  danling prune s3://bucket/project --keep-best         what would be deleted
  danling prune s3://bucket/project --keep-best --yes   delete it
  danling prune experiments --keep-last 2               best ones may go, too
  danling prune experiments --api --older-than 90d      flow runs in Prefect, no files

The newest checkpoint of every run stays, and runs that are being trained are
left alone. The epoch-N checkpoints that save_interval keeps go like all others:
with them goes what `danling reproduce RUN --epoch N` begins from."""
)
def prune(
    root: Annotated[str, Parameter(help="project root, local or remote")],
    /,
    *,
    keep_best: Annotated[bool, Parameter(help="keep each run's best checkpoint")] = False,
    keep_last: Annotated[int | None, Parameter(help="keep the newest K of each run; default: 1")] = None,
    api: Annotated[bool, Parameter(help="delete finished flow runs in Prefect, and no files")] = False,
    older_than: Annotated[
        str | None, Parameter(help="with --api: ended so long ago, as 90d, 12h, 2w")
    ] = None,
    yes: Annotated[bool, Parameter(help="delete; without it nothing is")] = False,
    endpoint_url: Endpoint = None,
) -> int:
    """Delete checkpoints that are not needed, epoch-N too; or what Prefect keeps of old runs."""
    if api or older_than is not None:
        if not api or older_than is None or keep_best or keep_last is not None:
            raise ConfigError("--api goes with --older-than, and not with --keep-best or --keep-last")
        from flows.api_retention import prune_api

        return prune_api(root, older_than, yes)
    from flows.cli_storage import prune_runs

    with endpoint(endpoint_url):
        return prune_runs(root, keep_best, keep_last, yes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    _words[:] = sys.argv[1:] if argv is None else argv
    if not _words:
        app.help_print([])
        return exit_codes.BAD_INPUT
    try:
        return app(_words, exit_on_error=False, print_error=False) or exit_codes.DONE
    except CycloptsError as error:
        command = _words[0] if _words[0] in app else ""
        help_line = " ".join(word for word in ("danling", command, "--help") if word)
        return _complain(f"{error} (see: {help_line})", exit_codes.BAD_INPUT)
    except (ConfigError, NotFound) as error:
        return _complain(str(error), exit_codes.BAD_INPUT)
    except DanLingError as error:
        return _complain(str(error), exit_codes.FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted", exit_codes.INTERRUPTED)
    except StoppedBySignal as stop:
        return _complain(f"{stop} before a run had begun: the same command begins", exit_codes.RESUMABLE)
    except BrokenPipeError:
        sys.stderr.close()
        return exit_codes.DONE
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("prefect", "httpx"):
            raise
        said = str(error).partition(" - For more information")[0] or type(error).__name__
        return _complain(f"the Prefect API: {said}", exit_codes.FAILED)


_words: list[str] = []
"""The command line as it was given, for the message that says how to resume."""


def _complain(message: str, code: int) -> int:
    say(f"danling: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
