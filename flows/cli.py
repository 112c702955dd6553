"""The command line `danling`: train runs, experiments and groups; list and show what was trained."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import metadata

from danling_core.errors import ConfigError, DanLingError, NotFound
from flows import cli_storage, cli_verify

DONE, FAILED, BAD_INPUT, RESUMABLE, INTERRUPTED = 0, 1, 2, 75, 130

_EXIT_CODES = """\
exit codes:
  0    done (a run that is complete already counts as done)
  1    a run failed; its rank's traceback is the last thing on stderr
  2    bad input: one message, nothing created
  75   stopped by SIGTERM or by its time limit; the same command resumes it
  130  stopped by Ctrl-C; the same command resumes it (a second Ctrl-C kills at once)
"""

_OVERRIDES = """\
Overrides are dotted: params.lr=0.01, dataloader.batch_size=64, scheduler=null. Values are read as YAML.
"""

_EXAMPLES = {
    "danling": """\
examples:
  danling run examples/digits/run.yaml                      train one run
  danling run examples/digits/run.yaml params.lr=0.003      the same with another learning rate
  danling experiment examples/digits/experiment.yaml        the runs of a sweep
  danling group examples/digits/group.yaml                  several experiments, ending in a leaderboard
  danling runs experiments --status complete                what there is
  danling show digits-cnn-baseline                          one run, its results and files
""",
    "run": """\
examples:
  danling run examples/digits/run.yaml
  danling run examples/digits/run.yaml params.lr=0.003 seed=0 nproc_per_node=2
  danling run examples/digits/run.yaml --fresh              begin anew, beside what is there
  PREFECT_API_URL=http://127.0.0.1:4200/api danling run examples/digits/run.yaml
""",
    "experiment": """\
examples:
  danling experiment examples/digits/experiment.yaml
  danling experiment examples/digits/experiment.yaml epoch_end=5
""",
    "group": """\
examples:
  danling group examples/digits/group.yaml
  danling group examples/digits/group.yaml epoch_end=5 project_root=s3://bucket/experiments
""",
    "runs": """\
examples:
  danling runs experiments
  danling runs s3://bucket/experiments --group digits --status failed
  danling runs experiments --json
""",
    "show": """\
examples:
  danling show digits-cnn-baseline
  danling show 0123abcd --root s3://bucket/experiments
  danling show experiments/digits-cnn-baseline-0123456789abcdef/20261121-103249-123456
""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    arguments = _parser().parse_args(argv)
    arguments.words = list(sys.argv[1:] if argv is None else argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except (ConfigError, NotFound) as error:
        return _complain(error, BAD_INPUT)
    except DanLingError as error:
        return _complain(error, FAILED)
    except KeyboardInterrupt:
        print("danling: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return DONE


def _complain(error: Exception, code: int) -> int:
    print(f"danling: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="danling",
        description="PyTorch experiments as Prefect flows.",
        epilog=f"{_EXAMPLES['danling']}\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"danling {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    run = _train_parser(commands, "run", "CONFIG.yaml", "train and evaluate one run, or resume it", _run)
    run.add_argument("--fresh", action="store_true", help="begin a new run folder, whatever is there")
    _train_parser(commands, "experiment", "FILE", "train the runs of an experiment", _experiment)
    _train_parser(commands, "group", "FILE", "train several experiments, ending in a leaderboard", _group)
    _runs_parser(commands)
    _show_parser(commands)
    cli_storage.add_parsers(commands)
    cli_verify.add_parsers(commands)
    return parser


def _command(commands: argparse._SubParsersAction, name: str, help_text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=f"{help_text[0].upper()}{help_text[1:]}.",
        epilog=_EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _train_parser(
    commands: argparse._SubParsersAction,
    name: str,
    file: str,
    help_text: str,
    command: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = _command(commands, name, help_text)
    parser.epilog = f"{_OVERRIDES}\n{_EXAMPLES[name]}\n{_EXIT_CODES}"
    parser.add_argument("file", metavar=file, help="a YAML or JSON file, local or at a URL")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted changes of every run's config"
    )
    parser.add_argument("--verbose", action="store_true", help="show Prefect's log lines too")
    parser.set_defaults(command=command)
    return parser


def _runs_parser(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "runs", "list the runs under a project root")
    parser.add_argument("root", metavar="ROOT", nargs="?", default="experiments", help="default: %(default)s")
    parser.add_argument(
        "--group", help="only runs trained for this group (one that was complete before keeps its own)"
    )
    parser.add_argument(
        "--status", choices=("running", "complete", "failed", "interrupted"), help="only these"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=_runs)


def _show_parser(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "show", "show one run: how it went, its results, its files")
    parser.add_argument("run", metavar="RUN", help="name, id, the beginning of an id, or a folder")
    parser.add_argument(
        "--root", default="experiments", help="project root to look under; default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=_show)


# Each command imports what it needs: `danling runs` must not wait for Prefect, nor `--help` for anything.


def _run(arguments: argparse.Namespace) -> int:
    from flows import cli_train

    return cli_train.run(arguments)


def _experiment(arguments: argparse.Namespace) -> int:
    from flows import cli_train

    return cli_train.experiment(arguments)


def _group(arguments: argparse.Namespace) -> int:
    from flows import cli_train

    return cli_train.group(arguments)


def _runs(arguments: argparse.Namespace) -> int:
    from flows import cli_list

    return cli_list.runs(arguments)


def _show(arguments: argparse.Namespace) -> int:
    from flows import cli_list

    return cli_list.show(arguments)


def _version() -> str:
    try:
        return metadata.version("danling-flows")
    except metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
