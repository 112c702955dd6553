"""`python -m danling_core.mirror --local DIR --remote URL`: see `MirrorService` for what it reads and answers."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence

from danling_core import storage
from danling_core.errors import Fenced, StorageError
from danling_core.mirror.alone import alone
from danling_core.mirror.service import FENCED, MirrorService
from danling_core.mirror.uploader import Uploader
from danling_core.process_tree import ignore_stop_signals
from danling_core.runs.folder import CHECKPOINTS
from danling_core.runs.lease import guard


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the mirror; return its exit code."""
    options = _parser().parse_args(arguments)
    ignore_stop_signals()  # its rank saves when they come, and then there is more to bring up
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    retry = storage.Retry(deadline_seconds=options.retry_seconds)
    storage.configure(json.loads(options.storage_options), retry=retry)

    is_owner = guard(options.lease, options.generation) if options.lease else _unguarded
    uploader = Uploader(
        options.local,
        options.remote,
        is_owner,
        generation=options.generation,
        checkpoints=options.checkpoints,
    )
    try:
        _check_once(is_owner)
    except Fenced as error:  # before it ends the mirror of whoever owns the run now
        uploader.note_error(error)
        return FENCED
    with alone(options.local):
        return MirrorService(
            uploader,
            sys.stdin,
            sys.stdout,
            interval_seconds=options.interval_seconds,
            drain_seconds=options.drain_seconds,
        ).run()


def _check_once(is_owner: Callable[[], None]) -> None:
    try:
        with storage.using(retry=storage.Retry(deadline_seconds=2.0)):
            is_owner()
    except StorageError as error:
        logging.getLogger("danling").warning("the lease is checked later: %s", error)


def _unguarded() -> None:
    """Do nothing: the caller named no lease, so it is the only writer."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m danling_core.mirror", description=__doc__)
    parser.add_argument("--local", required=True, help="the working folder")
    parser.add_argument("--remote", required=True, help="URL of the run folder")
    parser.add_argument("--lease", help="URL of the lease; without it nothing is fenced")
    parser.add_argument("--generation", type=int, default=1, help="of the lease, held by the run's owner")
    parser.add_argument("--checkpoints", default=CHECKPOINTS, help="name of the checkpoints' folder")
    parser.add_argument("--storage-options", default="{}", help="JSON, nothing secret")
    parser.add_argument(
        "--interval-seconds", type=float, default=30.0, help="between passes without a request"
    )
    parser.add_argument("--drain-seconds", type=float, default=600.0, help="for the last pass")
    parser.add_argument("--retry-seconds", type=float, default=60.0, help="for one operation within a pass")
    return parser


if __name__ == "__main__":
    sys.exit(main())
