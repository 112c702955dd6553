"""How long the training loop stands still for a checkpoint, beside a memory copy and a plain `torch.save`.

    python -m benchmarks.checkpoint_stall [--megabytes 100 1000] [--repeats 7] [--threads 1] [--folder DIR]

The state is a model of equal layers and its Adam state. Each repeat measures, with the disk quiet, a copy of
every tensor into warm buffers, `torch.save` to a file (with and without fsync), and `BackgroundSaver.save`,
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

import torch

from benchmarks.ratios import Ratio, table
from danling_core.checkpoints import BackgroundSaver, CheckpointStore

LIMIT = 1.3


def build_state(megabytes: int, layers: int = 24) -> dict[str, object]:
    """A model of `layers` linear layers with its Adam state: together `megabytes` (10**6 bytes)."""
    floats = megabytes * 1_000_000 // 4 // 3 // layers
    width = max(1, int(floats**0.5))
    model = torch.nn.Sequential(*(torch.nn.Linear(width, floats // width) for _ in range(layers)))
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}


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
    """Seconds of each repeat, by what was done."""
    state = build_state(megabytes)
    sources = tensors_of(state)
    warm = [torch.empty_like(tensor).copy_(tensor) for tensor in sources]
    plain = os.path.join(folder, "plain.pt")
    store = CheckpointStore(os.path.join(folder, "checkpoints"))
    saver = BackgroundSaver(store, lambda record, names: _prune(store))
    found: dict[str, list[float]] = {
        "copy": [],
        "torch.save": [],
        "torch.save + fsync": [],
        "stall": [],
        "commit": [],
    }

    def copy() -> None:
        for buffer, source in zip(warm, sources, strict=True):
            buffer.copy_(source)

    for step in range(repeats + 1):
        found["copy"].append(seconds(copy))
        found["torch.save"].append(seconds(lambda: torch_save(state, plain, is_synced=False)))
        found["torch.save + fsync"].append(seconds(lambda: torch_save(state, plain, is_synced=True)))
        began = time.perf_counter()
        saver.save(state, step=step, attempt="1.0", info={})
        found["stall"].append(saver.last_stall_seconds)
        saver.drain()
        found["commit"].append(time.perf_counter() - began)
    saver.close()
    return found


def _prune(store: CheckpointStore) -> None:
    store.prune(keep_last=1)


def ratios_of(megabytes: int, found: dict[str, list[float]]) -> list[Ratio]:
    """What was measured, beside the memory copy; `found` as `measure` gave it."""
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
