"""A runner in a notebook: a real kernel of Jupyter, its cells, and the button that interrupts one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import peers

# Runs in the environment that has a kernel: cells, each with the seconds after which it is interrupted.
NOTEBOOK = """
import json, sys, threading
from jupyter_client.manager import KernelManager

manager = KernelManager(kernel_name="python3")
manager.start_kernel()
client = manager.client()
client.start_channels()
client.wait_for_ready(timeout=60)
for code, seconds in json.loads(sys.argv[1]):
    asked = client.execute(code)
    if seconds:
        threading.Timer(seconds, manager.interrupt_kernel).start()
    seen = []
    while True:
        message = client.get_iopub_msg(timeout=60)
        content, kind = message["content"], message["msg_type"]
        if message["parent_header"].get("msg_id") != asked:
            continue
        if kind == "status" and content["execution_state"] == "idle":
            break
        text = content.get("text") or content.get("evalue") or content.get("data", {}).get("text/html", "")
        seen.append([kind, content.get("ename") or "", text])
    print(json.dumps(seen), flush=True)
manager.shutdown_kernel(now=True)
"""

SETUP = """
import tempfile, time
from tests.small_runner import SmallRunner, config

class Slow(SmallRunner):
    def after_step(self):
        time.sleep(0.05)

fields = dict(epoch_end=8, progress_bar=True, log_interval=1)
runner = Slow(config(tempfile.mkdtemp(), **fields))
"""
CELLS = [
    (SETUP, 0),
    ("runner.train()", 1.0),
    ("print('at', runner.steps, sorted(runner.evaluate('val')['val']))", 0),
    ("results = runner.train(); print('trained', runner.steps, runner.epochs, len(results))", 0),
    ("runner.train(); print('again', runner.steps); print(runner.infer('val')[0].shape)", 0),
    (
        "whole = Slow(config(tempfile.mkdtemp(), **fields)); whole.train(); print('same', whole.results == results)",
        0,
    ),
]


@pytest.mark.long
def test_a_cell_is_interrupted_and_the_next_one_goes_on(tmp_path: Path) -> None:
    done = peers.run(tmp_path, "-c", NOTEBOOK, json.dumps(CELLS))
    assert done.returncode == 0, done.stderr
    _, cut, looked, trained, again, whole = [json.loads(line) for line in done.stdout.splitlines()]
    assert ["error", "KeyboardInterrupt"] in [each[:2] for each in cut]
    bars = [text for kind, _, text in cut if kind in ("display_data", "update_display_data")]
    assert len(bars) > 2 and "<progress" in bars[0] and "epoch 0/8" in bars[0]
    told = [
        "".join(text for kind, _, text in cell if kind == "stream")
        for cell in (looked, trained, again, whole)
    ]
    assert "at " in told[0] and "['accuracy', 'loss']" in told[0] and "they count" not in told[0]
    assert "resumed on 1 x cpu from step" in told[1] and "trained " in told[1] and " 8 8" in told[1]
    assert "again " in told[2] and not any(
        kind == "error" for cell in (looked, trained, again) for kind, _, _ in cell
    )
    assert "same True" in told[3]
