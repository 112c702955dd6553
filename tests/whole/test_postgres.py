"""`danling up` over PostgreSQL: the choice for more than four runs at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from danling_core.parallel import loopback
from flows.server import why_unreachable
from tests.postgres import binaries, postgres
from tests.processes import wait_until

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_eight_runs_at_a_time_are_all_shown(
    toy_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    bin = binaries()
    if bin is None:
        pytest.skip("no PostgreSQL is installed: apt-get install postgresql")
    with loopback.listen(0) as listener:
        port = loopback.address(listener)[1]
    url = f"http://127.0.0.1:{port}/api"
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "home"), "PREFECT_API_URL": url}
    command = [sys.executable, "-m", "flows.cli"]
    with postgres(bin) as database:
        words = [*command, "up", "--port", str(port), "--database", database]
        up = subprocess.Popen(words, cwd=tmp_path, env={**environment, "PYTHONPATH": str(ROOT)})
        try:
            wait_until(lambda: why_unreachable(url, 2.0) is None, "the server", 100)
            file = tmp_path / "experiment.json"
            config = toy_config(experiment_name="eight", epoch_end=3)
            spec = {"config": config, "sweep": {"seed": list(range(16))}, "concurrency": 8}
            file.write_text(json.dumps(spec))
            for _ in range(2):
                done = subprocess.run(
                    [*command, "experiment", str(file)],
                    cwd=ROOT,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=110,
                )
                assert done.returncode == 0 and "lost sight" not in done.stderr, done.stderr
            from prefect.client.orchestration import SyncPrefectClient

            with SyncPrefectClient(url) as client:
                runs = client.read_flow_runs(limit=200)
        finally:
            up.send_signal(signal.SIGINT)
            up.wait(90)
    states = Counter((run.name.partition("-")[0], run.state.name) for run in runs if run.state is not None)
    assert states == {("eight", "Completed"): 18}, "16 runs, and the experiment twice"
    assert not (tmp_path / "home" / "prefect.db").exists()
