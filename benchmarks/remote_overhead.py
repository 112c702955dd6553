"""CPU time per step of the ranks of a run on S3, beside the same run on the local disk.

    python -m benchmarks.remote_overhead [--steps 1500] [--repeats 5] [--save-every 100]

Two ranks train an MLP of 64-128-10 and save every so many steps. Each repeat trains once on either root, one
right after the other, in alternating order. The CPU time is that of all threads of both ranks, from step 100
to the last; the mirror's process is not one of them. The store is a moto server of this machine in a process
of its own. The exit code is 1 if the ratio is surely above 1.1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import danling_core as dl
from benchmarks.ratios import Ratio, table, turns
from benchmarks.s3 import make_bucket, moto
from danling_core.config import Config
from danling_core.launch.client import Launcher
from danling_core.launch.plan import RunPlan
from danling_core.session.open_run import open_run

LIMIT = 1.1
FIRST_STEP = 100
_OUTPUT = "DANLING_BENCHMARK_OUTPUT"


class TimedRunner(dl.TorchRunner):
    """Leaves its CPU seconds per step in a file for each rank."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(6400, 64, generator=generator)
        self.datasets["train"] = TensorDataset(inputs, (inputs.sum(1) > 0).long())
        self.datasets["val"] = TensorDataset(inputs[:64], (inputs[:64].sum(1) > 0).long())
        self.model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self._cpu_began = 0.0

    def train_step(self, data: Any) -> Any:
        if self.steps == FIRST_STEP:
            self._cpu_began = time.process_time()
        if self.steps == (self.config.step_end or 0) - 1:
            seconds = (time.process_time() - self._cpu_began) / (self.steps - FIRST_STEP)
            Path(os.environ[_OUTPUT], f"rank-{self.rank}").write_text(json.dumps(seconds))
        return super().train_step(data)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save-every", type=int, default=100)
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {"local": [], "s3": []}
    with moto(), tempfile.TemporaryDirectory() as folder, Launcher() as launcher:
        make_bucket("danling-benchmark")
        for repeat in range(arguments.repeats + 1):
            local, s3 = ("local", f"{folder}/local"), ("s3", "s3://danling-benchmark/runs")
            for place, root in turns(repeat, local, s3):
                seconds = train(launcher, root, folder, arguments.steps, arguments.save_every, repeat)
                if repeat:  # the first of each warms the launcher up
                    times[place].append(seconds)
    print("'bare' is the local root; CPU time of both ranks per step")
    ratio = Ratio("root on S3", times["s3"], times["local"], LIMIT)
    print(table([ratio], "us", 1e-6))
    return int(ratio.falls_short)


def train(launcher: Launcher, root: str, folder: str, steps: int, save_every: int, repeat: int) -> float:
    """CPU seconds per step of both ranks together."""
    stated = {
        "runner": "benchmarks.remote_overhead:TimedRunner",
        "run_name": f"repeat-{repeat}",
        "experiment_id": "b" * 40,
        "project_root": root,
        "scratch": f"{folder}/scratch",
        "step_end": steps,
        "nproc_per_node": 2,
        "device": "cpu",
        "seed": repeat,
        "save_interval_steps": save_every,
        "upload_interval_seconds": 1.0,
    }
    [prepared] = launcher.prepare([Config.load(stated).dict()], cwd=os.getcwd())
    plan = RunPlan.of(prepared)
    opened = open_run(plan.config, plan.identity)
    if opened.lease is None:
        raise RuntimeError(f"{opened.folder.url} is complete already")
    os.environ[_OUTPUT] = folder
    with opened.lease.beating():
        launcher.run(plan.request(opened)).outcome().check()
    opened.lease.release()
    return sum(float(Path(folder, f"rank-{rank}").read_text()) for rank in range(2))


if __name__ == "__main__":
    sys.exit(main())
