"""Time an experiment of many short runs, several at a time: what a run costs beyond its own work.

Each round is a new Prefect home and a new project root: the experiment once, then once more with every run complete.
A gap is the time in which a slot trains nothing, from the end of one run to the first epoch of the next, by the events
of the runs. Requests are counted, and the database weighed, where the server is one that this script starts
(`--server sqlite`, or the URL of a PostgreSQL database, which should be empty); `embedded` is what a command starts
for itself.

python -m benchmarks.many_runs [--help]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from danling_core.parallel import loopback

QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True)
class Round:
    """Seconds of the experiment, of its repetition, and of each gap; what each command asked of the server."""

    first: float
    again: float
    gaps: list[float]
    requests: int | None = None
    requests_again: int | None = None
    kilobytes: float | None = None


def main() -> int:
    """Print one line per round, and the medians."""
    arguments = _parser().parse_args()
    rounds = []
    for index in range(arguments.repetitions):
        with tempfile.TemporaryDirectory(prefix="many-runs-") as folder:
            rounds.append(_round(Path(folder), arguments))
        print(f"round {index}: {_text(rounds[-1], arguments)}", flush=True)
    first = statistics.median(each.first for each in rounds)
    again = statistics.median(each.again for each in rounds)
    print(f"median of {len(rounds)}: {first:.1f} s, again {again:.1f} s")
    return 0


def _text(each: Round, arguments: argparse.Namespace) -> str:
    work = arguments.seconds * arguments.runs / arguments.concurrency
    beyond = (each.first - work) * arguments.concurrency / arguments.runs
    parts = [
        f"{each.first:.1f} s ({beyond:.2f} s of a slot a run beyond its own work), again {each.again:.1f} s",
        f"gaps: median {statistics.median(each.gaps):.2f}, 95 % {_percentile(each.gaps, 0.95):.2f}, "
        f"worst {max(each.gaps):.2f} s",
    ]
    if each.requests is not None and each.requests_again is not None and each.kilobytes is not None:
        runs = arguments.runs
        parts.append(
            f"a run: {each.requests / runs:.1f} requests (again {each.requests_again / runs:.1f}), "
            f"{each.kilobytes / runs:.0f} kB of database"
        )
    return "; ".join(parts)


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--concurrency", type=int, default=4, help="runs at a time (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.03, help="of work in a run (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--server", default="embedded", help="embedded, sqlite, or the URL of a database")
    return parser


def _round(folder: Path, arguments: argparse.Namespace) -> Round:
    spec = folder / "experiment.json"
    spec.write_text(json.dumps(_spec(arguments)))
    root = folder / "root"
    command = [sys.executable, "-m", "flows.cli", "experiment", str(spec), f"project_root={root}"]
    environment = {**os.environ, **QUIET, "OMP_NUM_THREADS": "1", "PREFECT_HOME": str(folder / "prefect")}
    if arguments.server == "embedded":
        return Round(_seconds(command, environment), _seconds(command, environment), _gaps(root, arguments))
    with _server(folder, arguments.server, environment) as log:
        before = _size(folder, arguments.server)
        first, requests = _seconds(command, environment), _requests(log)
        grown = (_size(folder, arguments.server) - before) / 1000
        again = _seconds(command, environment)
        return Round(first, again, _gaps(root, arguments), requests, _requests(log) - requests, grown)


def _spec(arguments: argparse.Namespace) -> dict[str, object]:
    config = {
        "experiment_name": "many-runs",
        "experiment_id": "b" * 40,
        "runner": "benchmarks.flow_runner:EpochRunner",
        "epoch_end": 1,
        "device": "cpu",
        "params": {"wait_seconds": arguments.seconds, "products": 0},
    }
    return {
        "config": config,
        "sweep": {"seed": list(range(arguments.runs))},
        "concurrency": arguments.concurrency,
    }


def _seconds(command: list[str], environment: dict[str, str]) -> float:
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return time.monotonic() - began


def _gaps(root: Path, arguments: argparse.Namespace) -> list[float]:
    spans = []
    for file in root.glob("*/*/events.jsonl"):
        events = [json.loads(line) for line in file.read_text().splitlines()]
        began = next(event["time"] for event in events if event["event"] == "epoch_began")
        ended = next(event["time"] for event in events if event["event"] == "completed")
        spans.append((began, ended))
    spans.sort()
    ends = sorted(end for _, end in spans)
    return [began - end for (began, _), end in zip(spans[arguments.concurrency :], ends, strict=False)]


@contextlib.contextmanager
def _server(folder: Path, database: str, environment: dict[str, str]) -> Iterator[Path]:
    """Start a Prefect server as a user would, on a free port; yields its log, which has a line per request."""
    with loopback.listen(0) as listener:
        port = loopback.address(listener)[1]
    url = f"http://127.0.0.1:{port}/api"
    environment["PREFECT_API_URL"] = url
    settings = {"PREFECT_LOGGING_SERVER_LEVEL": "INFO", "PREFECT_SERVER_LOGGING_LEVEL": "INFO"}
    if database != "sqlite":
        settings["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--port", str(port), "--no-ui"],
            env={**environment, **settings},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
                break
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not come up:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield log
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _requests(log: Path) -> int:
    return len(re.findall(r'"(?:GET|POST|PATCH|PUT|DELETE) (?!/api/health)', log.read_text()))


def _size(folder: Path, database: str) -> int:
    """Return the bytes of the database: of SQLite's files, or as PostgreSQL counts them."""
    if database == "sqlite":
        return sum(file.stat().st_size for file in (folder / "prefect").glob("prefect.db*"))
    import asyncio

    import asyncpg  # type: ignore[import-untyped]

    async def ask() -> int:
        connection = await asyncpg.connect(database.replace("+asyncpg", ""))
        try:
            return int(await connection.fetchval("SELECT pg_database_size(current_database())"))
        finally:
            await connection.close()

    return asyncio.run(ask())


if __name__ == "__main__":
    sys.exit(main())
