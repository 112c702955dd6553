"""Options that all commands share."""

from __future__ import annotations

import argparse


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help_text: str, epilog: str
) -> argparse.ArgumentParser:
    """Return a command's parser: its help begins with a sentence and ends with `epilog` as it is written."""
    return commands.add_parser(
        name,
        help=help_text,
        description=f"{help_text[0].upper()}{help_text[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """RUN, and where it is looked for."""
    parser.add_argument("run", metavar="RUN", help="name, id, the beginning of an id, or a folder")
    parser.add_argument("--root", default="experiments", help="project root of RUN; default: %(default)s")
    add_endpoint(parser)


def add_endpoint(parser: argparse.ArgumentParser) -> None:
    """The address of a store that is not its vendor's own."""
    parser.add_argument(
        "--endpoint-url", metavar="URL", help="of an S3-compatible store; default: AWS_ENDPOINT_URL"
    )
