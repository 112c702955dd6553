"""Measure how long the training loop stands still for a checkpoint, beside a memory copy and `torch.save`.

    python -m benchmarks.checkpoint_stall [--megabytes 100 1000] [--repeats 7] [--threads 1] [--folder DIR]

A runner whose model of equal layers has, with its Adam state, so many megabytes trains epochs of one step.
Where it saves after each, a copy of every tensor into warm buffers, `torch.save` to a file (with and without
fsync), and `TorchRunner.save_checkpoint` are measured, in alternating order, with the disk quiet; the save is
drained outside the clock. The first save, which has to allocate its buffers, is reported apart. The exit code
is 1 if the stall of the others is surely more than 1.3 times the copy.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import danling_core as dl
from benchmarks.ratios import Ratio, table, turns

LIMIT = 1.3
LAYERS = 24


class StallParams(dl.Params):
    """Size of the state, in 10**6 bytes."""

    megabytes: int


class StallRunner(dl.TorchRunner):
    """Instead of only saving it measures, and keeps the seconds of each save, by what was done."""

    params: StallParams

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = max(1, int((self.params.megabytes * 1_000_000 // 4 // 3 // LAYERS) ** 0.5))
        self.datasets["train"] = torch.utils.data.TensorDataset(torch.ones(1, width), torch.ones(1, width))
        self.model = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))
        self.criterion = nn.MSELoss()
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.seconds: dict[str, list[float]] = {
            name: [] for name in ("copy", "torch.save", "torch.save + fsync", "stall", "commit")
        }
        self._warm: list[torch.Tensor] = []

    def save_checkpoint(
        self, name: str = "latest", epochs: int | None = None, save_best: bool = True
    ) -> None:
        """One repeat of the measurement."""
        os.sync()
        save = super().save_checkpoint

        def ours() -> None:
            began = time.perf_counter()
            save(name, epochs, save_best)
            self.seconds["stall"].append(time.perf_counter() - began)
            self.run_session.files.drain()
            self.seconds["commit"].append(time.perf_counter() - began)

        for measure in turns(len(self.seconds["stall"]), self._measure_bare, ours):
            measure()

    def _measure_bare(self) -> None:
        state = self.state_dict()
        sources = tensors_of(state)
        self._warm = self._warm or [tensor.clone() for tensor in sources]
        path = os.path.join(self.dir, "plain.pt")

        def copy() -> None:
            for buffer, source in zip(self._warm, sources, strict=True):
                buffer.copy_(source)

        self.seconds["copy"].append(seconds(copy))
        self.seconds["torch.save"].append(seconds(lambda: torch_save(state, path, is_synced=False)))
        self.seconds["torch.save + fsync"].append(seconds(lambda: torch_save(state, path, is_synced=True)))


def tensors_of(state: object) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for value in values for tensor in tensors_of(value)]


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def torch_save(state: object, path: str, is_synced: bool) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        if is_synced:
            os.fsync(file.fileno())


def measure(megabytes: int, repeats: int, folder: str) -> dict[str, list[float]]:
    """Seconds of each repeat, by what was done; the first is not like the others."""
    runner = StallRunner(
        {
            "experiment_name": "checkpoint-stall",
            "project_root": folder,
            "epoch_end": repeats + 1,
            "device": "cpu",
            "keep_last": 1,
            "params": {"megabytes": megabytes},
            "progress_bar": False,
        }
    )
    runner.train("train", [])
    return runner.seconds


def ratios_of(megabytes: int, found: dict[str, list[float]]) -> list[Ratio]:
    """Return the measurements as ratios to the memory copy; `found` as `measure` gave it."""
    titles = {
        "stall": f"{megabytes} MB: stall, 2nd save on",
        "commit": f"{megabytes} MB: until committed",
        "torch.save": f"{megabytes} MB: torch.save",
        "torch.save + fsync": f"{megabytes} MB: torch.save + fsync",
    }
    ratios = [Ratio(f"{megabytes} MB: stall, first save", found["stall"][:1], found["copy"][:1])]
    for name, title in titles.items():
        limit = LIMIT if name == "stall" else None
        ratios.append(Ratio(title, found[name][1:], found["copy"][1:], limit))
    return ratios


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads, as in a rank (threads_per_rank)"
    )
    parser.add_argument("--folder", default=None, help="where to write; a temporary folder by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ratios = []
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            ratios += ratios_of(megabytes, measure(megabytes, arguments.repeats, folder))
    sys.stdout.write("'bare' is a copy of the same tensors into warm buffers\n")
    sys.stdout.write(table(ratios, "ms", 1e-3) + "\n")
    return int(any(ratio.falls_short for ratio in ratios))


if __name__ == "__main__":
    raise SystemExit(main())
