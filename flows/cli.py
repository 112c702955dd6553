"""The command line `danling`: train runs, experiments and groups; list and show what was trained."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata

from danling_core.errors import ConfigError, DanLingError, NotFound
from flows import cli_storage, cli_verify, exit_codes
from flows.cli_parsers import add_command, add_endpoint, add_run

_OVERRIDES = """\
Overrides are dotted: params.lr=0.01, dataloader.batch_size=64, scheduler=null. Values are read as YAML.
`danling keys` lists every key of a config, with its default; so does docs/reference.md.
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
  danling experiment examples/digits/run.yaml epoch_end=5 --sweep params.lr=1e-3,3e-3 seed=0,1
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


_KEYS = """\
examples:
  danling keys
  danling keys checkpoint
"""
_STATUSES = ("running", "complete", "failed", "interrupted", "unknown")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    arguments = _parsed(argv)
    arguments.words = list(sys.argv[1:] if argv is None else argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        with _endpoint(arguments):
            return command(arguments)
    except (ConfigError, NotFound) as error:
        return _complain(error, exit_codes.BAD_INPUT)
    except DanLingError as error:
        return _complain(error, exit_codes.FAILED)
    except KeyboardInterrupt:
        print("danling: interrupted", file=sys.stderr)
        return exit_codes.INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return exit_codes.DONE


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line; overrides may stand anywhere behind the file, options between them too."""
    parser = _parser()
    arguments, left = parser.parse_known_args(argv)
    if left and not (hasattr(arguments, "overrides") and all(_is_override(word) for word in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        arguments.overrides += left
    return arguments


def _is_override(word: str) -> bool:
    return "=" in word and not word.startswith("-")


@contextlib.contextmanager
def _endpoint(arguments: argparse.Namespace) -> Iterator[None]:
    """Reach stores at `--endpoint-url`, where the command has it and it is given."""
    if getattr(arguments, "endpoint_url", None) is None:
        yield
        return
    from danling_core import storage

    with storage.using({"endpoint_url": arguments.endpoint_url}):
        yield


def _complain(error: Exception, code: int) -> int:
    print(f"danling: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="danling",
        description="PyTorch experiments as Prefect flows.",
        epilog=f"{_EXAMPLES['danling']}\n{exit_codes.MEANINGS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"danling {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _train_parser(commands, "run", "CONFIG.yaml", "train and evaluate one run, or resume it")
    experiment = _train_parser(commands, "experiment", "FILE", "train the runs of an experiment")
    experiment.add_argument(
        "--sweep",
        nargs="+",
        action="extend",
        default=[],
        metavar="key=value,value",
        help="train every combination of these values (a key with one value among them is an override); FILE is then "
        "a run's CONFIG.yaml",
    )
    _train_parser(commands, "group", "FILE", "train several experiments, ending in a leaderboard")
    _runs_parser(commands)
    _show_parser(commands)
    keys = add_command(commands, "keys", "list the keys of a config, with defaults and meanings", _KEYS)
    keys.add_argument("text", nargs="?", default="", help="only those in which this occurs")
    keys.set_defaults(command=_later("cli_keys", "keys"))
    cli_storage.add_parsers(commands)
    cli_verify.add_parsers(commands)
    return parser


def _train_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, file: str, help_text: str
) -> argparse.ArgumentParser:
    epilog = f"{_OVERRIDES}\n{_EXAMPLES[name]}\n{exit_codes.MEANINGS}"
    parser = add_command(commands, name, help_text, epilog)
    parser.add_argument("file", metavar=file, help="a YAML or JSON file, local or at a URL")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="dotted changes of every run's config"
    )
    parser.add_argument("--fresh", action="store_true", help="begin new run folders, whatever is there")
    parser.add_argument("--verbose", action="store_true", help="show Prefect's log lines too")
    parser.set_defaults(command=_later("cli_train", name))
    return parser


def _runs_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "runs", "list the runs under a project root, newest first", _EXAMPLES["runs"]
    )
    parser.add_argument("root", metavar="ROOT", nargs="?", default="experiments", help="default: %(default)s")
    parser.add_argument(
        "--group", help="only runs trained for this group (one that was complete before keeps its own)"
    )
    parser.add_argument("--status", choices=_STATUSES, help="only these")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_endpoint(parser)
    parser.set_defaults(command=_later("cli_list", "runs"))


def _show_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "show", "show one run: how it went, its results, its files", _EXAMPLES["show"]
    )
    add_run(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=_later("cli_list", "show"))


def _later(module: str, name: str) -> Callable[[argparse.Namespace], int]:
    """Return a command that imports what it needs when it is called: `danling runs` must not wait for Prefect."""
    return lambda arguments: getattr(importlib.import_module(f"flows.{module}"), name)(arguments)


def _version() -> str:
    try:
        return metadata.version("danling-flows")
    except metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
