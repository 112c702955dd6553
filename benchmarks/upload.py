"""A large checkpoint on its way to S3: memory of the mirror, and its speed beside s3fs's own `put_file`.

    python -m benchmarks.upload [--megabytes 1000] [--repeats 3] [--endpoint URL --bucket NAME]

Without an endpoint rclone's server over a folder of this machine is used. The two take turns, in alternating
order. The extra memory is the peak of the mirror's process with the checkpoint over its peak with a tiny one.
The exit code is 1 if it is more than 150 MB, or if the speed is surely less than 0.8 of s3fs's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
import uuid
from typing import Any

from benchmarks.ratios import Ratio, table, turns
from benchmarks.s3 import make_bucket, rclone
from danling_core import storage
from danling_core.checkpoints.store import CheckpointStore
from danling_core.mirror.process import MirrorProcess

LIMIT_MEGABYTES, LIMIT = 150, 1 / 0.8


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--endpoint", help="an S3 endpoint; its credentials come from the environment")
    parser.add_argument("--bucket", default="danling-benchmark", help="made if it is not there")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if arguments.endpoint is None:
            stack.enter_context(rclone(stack.enter_context(tempfile.TemporaryDirectory())))
        else:
            os.environ["AWS_ENDPOINT_URL"] = arguments.endpoint
        make_bucket(arguments.bucket)
        root = f"s3://{arguments.bucket}/{uuid.uuid4().hex}"
        small = mirrored(root, os.path.join(folder, "small"), 1)[1]
        ours, bare, peaks = measure(root, folder, arguments.megabytes, arguments.repeats)
    extra = max(peaks) - small
    ratio = Ratio(f"{arguments.megabytes} MB through the mirror", ours, bare, LIMIT)
    print(
        "'bare' is s3fs's put_file of a file as large; 'ours' begins with the request and ends with its answer"
    )
    print(table([ratio], "s"))
    print(
        f"extra memory of the mirror: {extra:.0f} MB (limit {LIMIT_MEGABYTES} MB), {small:.0f} MB without it"
    )
    return int(ratio.falls_short or extra > LIMIT_MEGABYTES)


def measure(
    root: str, folder: str, megabytes: int, repeats: int
) -> tuple[list[float], list[float], list[float]]:
    """Seconds through the mirror, seconds by s3fs alone, and the mirror's peak memory in MB, of each repeat."""
    ours: list[float] = []
    bare: list[float] = []
    peaks: list[float] = []
    payload = os.path.join(folder, "payload")
    with open(payload, "wb") as file:
        _fill(file, megabytes)
    for repeat in range(repeats):
        for side in turns(repeat, "bare", "ours"):
            if side == "bare":
                bare.append(put_by_s3fs(root, payload))
                continue
            seconds, peak = mirrored(root, os.path.join(folder, str(repeat)), megabytes)
            ours.append(seconds)
            peaks.append(peak)
        storage.delete(root, recursive=True)
    return ours, bare, peaks


def mirrored(root: str, work: str, megabytes: int) -> tuple[float, float]:
    """Seconds until a checkpoint of so many megabytes is remote, and the mirror's peak memory in MB."""
    os.makedirs(work)
    store = CheckpointStore(os.path.join(work, "checkpoints"))
    with MirrorProcess(work, f"{root}/run-{uuid.uuid4().hex[:8]}", interval_seconds=600) as mirror:
        mirror.request_sync()
        mirror.wait_synced()  # it is started, and connected
        store.commit(lambda file: _fill(file, megabytes), step=1, attempt="1.0", info={})
        began = time.perf_counter()
        mirror.request_sync()
        mirror.wait_synced()
        seconds = time.perf_counter() - began
        return seconds, _peak_megabytes(mirror.pid)


def put_by_s3fs(root: str, path: str) -> float:
    """Seconds of s3fs's own upload of the file, with its own defaults."""
    program = (
        "import s3fs, sys, time; fs = s3fs.S3FileSystem(use_listings_cache=False); fs.exists(sys.argv[2]);"
        "began = time.perf_counter(); fs.put_file(sys.argv[1], sys.argv[2]); print(time.perf_counter() - began)"
    )
    command = [sys.executable, "-c", program, path, f"{root}/bare.pt"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _fill(file: Any, megabytes: int) -> None:
    block = os.urandom(1_000_000)
    for _ in range(megabytes):
        file.write(block)


def _peak_megabytes(pid: int) -> float:
    with open(f"/proc/{pid}/status") as file:
        [line] = [line for line in file if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    raise SystemExit(main())
