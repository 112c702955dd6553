"""Time one training step of `TorchRunner` against a bare loop that a careful user would write.

An MLP 64-128-10 with SGD on batches of 32, float32, one thread per rank, with the runner's defaults:
events and text log on. The two take turns, an epoch each, in one process (with
two ranks: in one process group), and the order alternates. Wall and CPU time are of the epoch's loop;
saving is not in it.

Ready batches lie in memory; once, three values of each step are logged besides. With the stock DataLoader the
bare loop reads a shuffled TensorDataset; the runner is given the same tensors and uses its own loader.

python -m benchmarks.step_overhead [--help]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ratios import Ratio, table

WARM_UP_REPETITIONS = 3
CASES: list[tuple[int, str, float | None]] = [
    (1, "ready", 1.15),
    (1, "logged", 1.20),
    (1, "loader", None),
    (2, "ready", 1.05),
    (2, "loader", None),
]


SOURCES = {
    "ready": "ready batches",
    "logged": "ready batches, three values logged",
    "loader": "stock DataLoader",
}


def main() -> int:
    """Run the cases that were asked for; 1 where one falls short."""
    arguments = _parser().parse_args()
    if arguments.case:
        world, data = arguments.case.split(":")
        _measure_here(int(world), data, arguments)
        return 0
    ratios: list[Ratio] = []
    for world, data, limit in CASES:
        if str(world) not in arguments.ranks:
            continue
        times = _measure_apart(world, data, arguments)
        ranks = f"{world} rank{'s' if world > 1 else ''}"
        source = SOURCES[data]
        for clock in ("wall", "cpu"):
            name = f"{ranks}, {source}, {clock} time"
            ratios.append(Ratio(name, times["ours"][clock], times["bare"][clock], limit))
    print(table(ratios, unit="us", per=1e-6))
    return int(any(ratio.falls_short for ratio in ratios))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=300, help="steps in one repetition (default: %(default)s)"
    )
    parser.add_argument("--repetitions", type=int, default=40, help="of each case (default: %(default)s)")
    parser.add_argument("--ranks", nargs="+", choices=("1", "2"), default=["1", "2"], help="default: both")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # RANKS:DATA, in a process of its own
    parser.add_argument("--output", help=argparse.SUPPRESS)
    return parser


def _measure_apart(world: int, data: str, arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of a step, by repetition, measured in fresh processes: `{ours | bare: {wall | cpu: [...]}}`."""
    launcher = ["-m"]
    if world > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "-m"]
    with tempfile.TemporaryDirectory(prefix="step-overhead-") as folder:
        output = Path(folder) / "times.json"
        command = [sys.executable, *launcher, "benchmarks.step_overhead", "--case", f"{world}:{data}"]
        command += ["--steps", str(arguments.steps), "--repetitions", str(arguments.repetitions)]
        done = subprocess.run(
            [*command, "--output", str(output)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0 or not output.exists():
            raise SystemExit(f"the case of {world} rank(s), {data} failed:\n{done.stdout}\n{done.stderr}")
        times: dict[str, dict[str, list[float]]] = json.loads(output.read_text())
        return times


def _measure_here(world: int, data: str, arguments: argparse.Namespace) -> None:
    """One case, on every rank; rank 0 writes the times."""
    import torch

    from benchmarks.step_runner import BATCH_SIZE, StepRunner

    torch.set_num_threads(1)
    repetitions = WARM_UP_REPETITIONS + arguments.repetitions
    folder = Path(arguments.output).parent
    runner = StepRunner(
        {
            "experiment_name": f"step-overhead-{world}-{data}",
            "project_root": str(folder / "runs"),
            "epoch_end": repetitions,
            "device": "cpu",
            "dataloader": {"batch_size": BATCH_SIZE},
            "params": {"data": data, "steps": arguments.steps, "world": world},
            "nproc_per_node": world,
            "progress_bar": False,
        }
    )
    runner.train()
    if runner.is_main_process:
        kept = {side: _by_clock(times[WARM_UP_REPETITIONS:]) for side, times in runner.times.items()}
        Path(arguments.output).write_text(json.dumps(kept))


def _by_clock(times: Sequence[tuple[float, float]]) -> dict[str, list[float]]:
    return {"wall": [wall for wall, _ in times], "cpu": [cpu for _, cpu in times]}


if __name__ == "__main__":
    sys.exit(main())
