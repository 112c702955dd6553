"""Time what is done about a group of thousands of runs that are there: list, rank, go on with it.

One run is trained; its folder is copied for each run of the group under the name and the id that this run has, so the
store looks as if all had been trained. Then commands are timed, with the memory of their largest process.

python -m benchmarks.big_group [--help]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from danling_core.config.sweep import GroupSpec
from danling_core.identity.ids import identify

QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
SMALL = (
    "config.yaml",
    "metadata.json",
    "status.json",
    "results.json",
    "latest.json",
    "best.json",
    "evaluation.json",
)


def main() -> int:
    """Print a line per command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--keep", help="folder to work in, which is left as it is then")
    arguments = parser.parse_args()
    folder = Path(arguments.keep or tempfile.mkdtemp(prefix="big-group-"))
    try:
        _measure(folder, arguments.runs)
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder)
    return 0


def _measure(folder: Path, runs: int) -> None:
    root = folder / "root"
    file = folder / "group.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(_spec(root, 1)))
        _timed(folder, "group", str(file), name="train one run")
        file.write_text(json.dumps(_spec(root, runs)))
        _copy(root, GroupSpec.load(file))
    _timed(folder, "runs", str(root))
    _timed(folder, "group", str(file), name="group, all complete")
    victims = sorted(root.glob("*/*/status.json"))[:3]
    for status in victims:
        shutil.rmtree(status.parents[1])
    _timed(folder, "group", str(file), name="group, three to train")


def _spec(root: Path, runs: int) -> dict[str, Any]:
    config = {
        "experiment_name": "big",
        "experiment_id": "b" * 40,
        "runner": "benchmarks.flow_runner:EpochRunner",
        "project_root": str(root),
        "epoch_end": 1,
        "device": "cpu",
        "params": {"wait_seconds": 0.0, "products": 0},
    }
    return {"group": "big", "experiments": [{"config": config, "sweep": {"seed": list(range(runs))}}]}


def _copy(root: Path, spec: GroupSpec) -> None:
    [first] = root.glob("*/*/status.json")
    status = json.loads(first.read_text())
    source = first.parent
    texts = {name: (source / name).read_text() for name in SMALL if (source / name).exists()}
    metadata = json.loads(texts["metadata.json"])
    run_id = metadata["run_id"]
    for config in (config for plan in spec.configs() for config in plan.configs):
        identity = identify(config, None)
        target = root / f"{identity.name}-{identity.id}" / source.name
        if target.exists():
            continue
        target.mkdir(parents=True)
        for name, text in texts.items():
            (target / name).write_text(
                text.replace(run_id, identity.run_id)
                .replace(status["id"], identity.id)
                .replace(status["name"], identity.name)
            )


def _timed(folder: Path, *words: str, name: str = "") -> None:
    environment = {**os.environ, **QUIET, "PREFECT_HOME": str(folder / "prefect")}
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    most = 0.0
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115
    reader = threading.Thread(target=lambda: output.write(process.stdout.read() if process.stdout else ""))
    reader.start()
    while process.poll() is None:
        most = max(most, _peak_megabytes(process.pid))
        time.sleep(0.05)
    reader.join()
    seconds = time.monotonic() - began
    print(
        f"{name or words[0]:24} {seconds:7.1f} s, {most:6.0f} MB, exit code {process.returncode}", flush=True
    )
    if process.returncode != 0:
        output.seek(0)
        print(output.read()[-2000:], file=sys.stderr)


def _peak_megabytes(pid: int) -> float:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


if __name__ == "__main__":
    sys.exit(main())
