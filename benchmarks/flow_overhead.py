"""Time a run of many short epochs under the Prefect flow against the same run under torchrun alone.

Each epoch becomes a task run of Prefect, so short epochs show what observing costs. Time goes from the
first "epoch_began" to the terminal event in the run's events.jsonl: the start of processes and of
Prefect's server is excluded. The two take turns, in alternating order; each starts anew, in a folder of its own.

python -m benchmarks.flow_overhead [--help]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.flow_runner import products_in
from benchmarks.ratios import Ratio, table, turns

LIMIT = 1.15


def main() -> int:
    """Run both by turns; 1 where the flow falls short."""
    arguments = _parser().parse_args()
    ours: list[float] = []
    bare: list[float] = []
    with tempfile.TemporaryDirectory(prefix="flow-overhead-") as folder:
        config = Path(folder) / "run.json"
        config.write_text(json.dumps(_config(arguments)))
        for repetition in range(arguments.repetitions):
            root = Path(folder) / str(repetition)
            flow = ours, "flow", [sys.executable, "-m", "flows.cli", "run", str(config)]
            torchrun = bare, "torchrun", _torchrun(config, arguments.ranks)
            for times, name, command in turns(repetition, torchrun, flow):
                times.append(_seconds(command, root / name))
            print(f"repetition {repetition}: torchrun {bare[-1]:.2f} s, flow {ours[-1]:.2f} s", flush=True)
    name = f"{arguments.epochs} epochs of {arguments.epoch_seconds * 1000:.0f} ms, {arguments.work}"
    ratio = Ratio(name, ours, bare, LIMIT)
    print(table([ratio], unit="ms", per=1e-3))
    return int(ratio.falls_short)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=60, help="default: %(default)s")
    parser.add_argument(
        "--epoch-seconds",
        type=float,
        default=0.05,
        help="work in each, beside 10 short steps (default: %(default)s)",
    )
    parser.add_argument("--ranks", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--repetitions", type=int, default=5, help="of each (default: %(default)s)")
    parser.add_argument(
        "--work",
        choices=("wait", "compute"),
        default="wait",
        help="what ranks do: wait, as for a GPU, or keep a core busy each (default: %(default)s)",
    )
    return parser


def _config(arguments: argparse.Namespace) -> dict[str, Any]:
    waits, seconds = arguments.work == "wait", arguments.epoch_seconds
    return {
        "experiment_name": "flow-overhead",
        "runner": "benchmarks.flow_runner:EpochRunner",
        "epoch_end": arguments.epochs,
        "nproc_per_node": arguments.ranks,
        "device": "cpu",
        "stages": ["train"],
        "params": {
            "wait_seconds": seconds if waits else 0.0,
            "products": 0 if waits else products_in(seconds),
        },
    }


def _torchrun(config: Path, ranks: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *launcher, "-m", "danling_core.worker", str(config)]


def _seconds(command: list[str], root: Path) -> float:
    """Return the seconds of the run's epochs, by its own events."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PREFECT_HOME": str(root.parent.parent / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    done = subprocess.run([*command, f"project_root={root}"], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    (file,) = root.glob("*/*/events.jsonl")
    events = [json.loads(line) for line in file.read_text().splitlines()]
    began = next(event["time"] for event in events if event["event"] == "epoch_began")
    ended = next(event["time"] for event in events if event["event"] == "completed")
    return float(ended - began)


if __name__ == "__main__":
    sys.exit(main())
