"""Compare the bits that two versions of the code compute: `python scripts/same_bits.py COMMIT`.

Trains the digits and the language model on one and two ranks, undisturbed and killed in the middle of an epoch and
resumed, and hashes weights, optimizer state, results and evaluation. Exits with 1 where a hash differs.

`--write FILE` keeps the hashes of this tree; `--against FILE` compares with kept ones instead of a commit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    "digits": ["examples/digits/run.yaml", "epoch_end=6", "params.width=16", "save_interval_steps=5"],
    "charlm": [
        *("examples/charlm/run.yaml", "step_end=48", "evaluate_interval_steps=16", "save_interval_steps=5"),
        *("params.width=32", "params.depth=1", "scheduler.warmup_steps=4", "non_finite=skip"),
    ],
}
QUIET = ["tensorboard=false", "progress_bar=false"]
DEADLINE_SECONDS = 300


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", nargs="?", help="the commit to compare this tree with")
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep the hashes of this tree")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with kept hashes")
    options = parser.parse_args()
    if not (options.commit or options.write or options.against):
        parser.error("name a commit, or --write or --against a file")
    mine = hashes_of(ROOT)
    if options.write:
        options.write.write_text(json.dumps(mine, indent=1) + "\n")
    others = json.loads(options.against.read_text()) if options.against else {}
    if options.commit:
        others = hashes_of_commit(options.commit)
    differing = [name for name in others if others[name] != mine.get(name)]
    for name, digest in mine.items():
        verdict = "" if name not in others else "DIFFERS" if name in differing else "same"
        print(f"{name:36} {digest[:16]} {verdict}")
    return 1 if differing else 0


def hashes_of_commit(commit: str) -> dict[str, str]:
    """Return the hashes of a commit, checked out beside this tree."""
    with tempfile.TemporaryDirectory(prefix="same-bits-") as folder:
        tree = os.path.join(folder, "tree")
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", tree, commit], cwd=ROOT, check=True)
        try:
            return hashes_of(Path(tree))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


def hashes_of(tree: Path) -> dict[str, str]:
    """Train every case with the code in `tree`; returns a hash for each thing that must not change."""
    found: dict[str, str] = {}
    for case, words in CASES.items():
        for ranks in (1, 2):
            for is_killed in (False, True):
                with tempfile.TemporaryDirectory(prefix="same-bits-") as root:
                    folder = train(tree, [*words, *QUIET], ranks, Path(root), is_killed)
                    how = "resumed" if is_killed else "undisturbed"
                    found |= {f"{case} {ranks} {how} {k}": v for k, v in digests(folder).items()}
    return found


def train(tree: Path, words: list[str], ranks: int, root: Path, is_killed: bool) -> Path:
    """Train one run to its end, with a SIGKILL inside an epoch where wanted; returns its folder."""
    if is_killed:
        process = start(tree, words, ranks, root)
        await_commit_inside_epoch(process, root)
        for pid in [*descendants(process.pid), process.pid]:  # torchrun gives each rank a session of its own
            os.kill(pid, signal.SIGKILL)
        process.wait()
    process = start(tree, words, ranks, root)
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    if process.returncode:
        sys.exit(f"training in {tree} failed:\n{output}")
    [status] = root.glob("*/*/status.json")
    if is_killed and not any(event.get("resumed") for event in events(root)):
        sys.exit(f"the run in {tree} was not resumed: it ended before it was killed")
    return status.parent


def start(tree: Path, words: list[str], ranks: int, root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "danling_core.worker", *words, f"project_root={root}", f"nproc_per_node={ranks}"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=tree, env=environment, start_new_session=True, **pipes)


def descendants(pid: int) -> list[int]:
    """Processes that `pid` and its children started. Linux only."""
    children = [
        int(c)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for c in (task / "children").read_text().split()
    ]
    return [each for child in children for each in (child, *descendants(child))]


def await_commit_inside_epoch(process: subprocess.Popen[str], root: Path) -> None:
    """Return once a checkpoint was committed after the first epoch or segment, inside the next one."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        seen = list(events(root))
        finished = [n for n, event in enumerate(seen) if event["event"] == "epoch_finished"]
        later = seen[finished[0] + 1 :] if finished else []
        # the first commit after an epoch is that epoch's own
        if sum(event["event"] == "checkpoint_committed" for event in later) > 1:
            return
        time.sleep(0.005)
    sys.exit(f"no checkpoint was committed inside the second epoch (exit code {process.poll()})")


def events(root: Path) -> Iterator[dict[str, Any]]:
    for path in root.glob("*/*/events.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def digests(folder: Path) -> dict[str, str]:
    """Return hashes of the newest checkpoint's tensors, the results and the evaluation."""
    record = json.loads((folder / "checkpoints/latest.json").read_text())["record"]
    state = torch.load(folder / f"checkpoints/data/{record}/state.pt", weights_only=True)
    values: dict[str, Any] = {part: state.get(part) for part in ("model", "ema", "optimizer", "scheduler")}
    values["results"] = json.loads((folder / "results.json").read_text())["results"]
    values["evaluation"] = json.loads((folder / "evaluation.json").read_text())["result"]
    return {name: digest(value) for name, value in values.items() if value is not None}


def digest(value: Any) -> str:
    """Return a hash of nested plain values and tensors, exact to the bit."""
    state = hashlib.sha256()
    for piece in flat(value):
        state.update(piece)
    return state.hexdigest()


def flat(value: Any) -> Iterator[bytes]:
    if isinstance(value, dict):
        for key in value:
            yield f"{key}:".encode()
            yield from flat(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from flat(item)
    elif isinstance(value, torch.Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    else:
        yield repr(value).encode()


if __name__ == "__main__":
    sys.exit(main())
