"""`danling tune`: learning rates and batch sizes that are tried for a few steps."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from danling_core.errors import ConfigError
from danling_core.tools.tune.batch import batch_search
from danling_core.tools.tune.rate import RangeTest, range_test
from flows.cli import main

ROOT = Path(__file__).parents[2]
TOY = {"runner": f"{ROOT}/tests/toy_runner.py:ToyRunner", "epoch_end": 2, "dataloader": {"batch_size": 10}}
HUNGRY = {
    "runner": f"{ROOT}/tests/hungry_runner.py:HungryRunner",
    "epoch_end": 1,
    "dataloader": {"batch_size": 8},
    "optim": {"name": "sgd", "lr": 0.1},
}


def written(root: Path, values: Any, **more: Any) -> str:
    file = root / "run.yaml"
    file.write_text(yaml.safe_dump({**values, **more}))
    return str(file)


def test_the_rate_goes_up_in_equal_ratios_and_groups_keep_theirs(tmp_path: Path) -> None:
    file = written(tmp_path, TOY, optim={"name": "sgd", "lr": 0.5, "groups": [{"match": "bias", "lr": 0.05}]})
    found = range_test(file, lowest=1e-4, highest=1e-1, count=31)
    assert len(found.rates) == 31 and found.key == "optim.lr"
    assert [found.rates[at] for at in (0, 10, 20, 30)] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])


def test_a_proposed_rate_lies_where_the_loss_falls_fastest_before_it_is_lowest() -> None:
    losses = [2.0] * 20 + [1.8, 1.2, 0.6, 0.4, 0.3] + [0.3] * 5 + [3.0, 9.0, 1.0, 9.0]
    found = RangeTest([10 ** (at / 10 - 4) for at in range(len(losses))], losses)
    assert found.proposed is not None and 10**-2.1 < found.proposed < 10**-1.6
    assert RangeTest(found.rates[:20], [2.0 + at for at in range(20)]).proposed is None
    assert RangeTest([], []).proposed is None


def test_the_proposed_rate_trains_well(tmp_path: Path) -> None:
    found = range_test(written(tmp_path, TOY), lowest=1e-6, highest=100.0, count=120)
    assert found.key == "params.lr" and found.proposed is not None and 1e-3 < found.proposed < 1


def test_a_loss_that_leaves_all_bounds_ends_the_test(tmp_path: Path) -> None:
    file = written(tmp_path, TOY, params={"lr": 0.1, "width": 4})
    found = range_test(file, lowest=1e-2, highest=1e30, count=80)
    assert found.has_diverged and len(found.rates) < 80


def test_ranks_are_stood_for_by_as_many_batches(tmp_path: Path) -> None:
    one = range_test(
        written(tmp_path, TOY), ["dataloader.batch_size=20", "dataloader.train.shuffle=false"], count=10
    )
    two = range_test(
        written(tmp_path, TOY),
        ["nproc_per_node=2", "dataloader.batch_size=10", "dataloader.train.shuffle=false"],
        count=10,
    )
    assert one.losses == pytest.approx(two.losses, rel=1e-4)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"lowest": 0.0}, "above 0"),
        ({"lowest": 2.0}, "2 to 1"),
        ({"count": 3}, "at least 10 steps"),
    ],
)
def test_bounds_that_cannot_be_are_refused(tmp_path: Path, bounds: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        range_test(written(tmp_path, TOY), **bounds)


def test_the_command_shows_a_curve_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, picture = written(tmp_path, TOY), tmp_path / "lr.svg"
    assert main(["tune", "lr", file, "params.width=4", "--steps", "60", "--out", str(picture)]) == 0
    told = capsys.readouterr().out
    proposed = re.search(r"proposed: (params\.lr=\S+),", told)
    assert proposed is not None and f"danling run {file} params.width=4 {proposed[1]}" in told
    assert told.count("|") > 5 and "*" in told
    assert "<svg" in picture.read_text() and "1e-07" in picture.read_text()
    assert not (tmp_path / "experiments").exists()
    assert main(["tune", "lr", file, "--out", "lr.png"]) == 2
    assert "an .svg file" in capsys.readouterr().err


def test_batches_double_until_the_data_set_has_no_more(tmp_path: Path) -> None:
    trials = batch_search(written(tmp_path, TOY), count=2)
    assert [trial.batch_size for trial in trials] == [5, 10, 20, 40]
    assert all(trial.samples_per_second and trial.memory_bytes for trial in trials)
    trials = batch_search(written(tmp_path, TOY), count=2, largest=25)
    assert [trial.batch_size for trial in trials] == [5, 10, 20]


def test_the_search_ends_before_a_size_that_would_take_all_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from danling_core.tools.tune import batch

    # a fork begins with what this process holds
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 1_500_000_000
    monkeypatch.setattr(batch, "_available_bytes", lambda: limit)
    trials = batch_search(written(tmp_path, HUNGRY), ["dataloader.batch_size=32"], count=1)
    failed = [trial for trial in trials if trial.failed]
    fits = [trial for trial in trials if not trial.failed]
    assert failed and f"of {limit / 1e9:.1f} GB" in str(failed[0].failed)
    assert max(trial.memory_bytes or 0 for trial in fits) < limit
    assert min(t.batch_size for t in failed) / max(t.batch_size for t in fits) < 1.13


@pytest.mark.long
@pytest.mark.timeout(500)
def test_a_process_that_runs_out_of_memory_is_survived(tmp_path: Path) -> None:
    limit = 5_000_000_000  # of addresses, of which torch takes some by itself
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "flows.cli",
            "tune",
            "batch",
            written(tmp_path, HUNGRY),
            "dataloader.batch_size=64",
            "--steps",
            "1",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert done.returncode == 0, done.stderr
    assert "out of memory" in done.stdout or "would take" in done.stdout
    assert re.search(r"proposed: dataloader.batch_size=\d+", done.stdout)


def test_a_batch_size_that_does_not_fit_at_all_and_a_loader_of_ones_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the toy fails in its constructor"):
        batch_search(written(tmp_path, TOY, params={"fails_in_constructor": True}))
    with pytest.raises(ConfigError, match="runner is missing"):
        batch_search(written(tmp_path, {"epoch_end": 1}))


def test_a_negative_loss_is_no_sign_of_divergence(tmp_path: Path) -> None:
    found = range_test(
        written(tmp_path, {**TOY, "runner": f"{ROOT}/tests/hungry_runner.py:Lowered"}), count=40, highest=0.1
    )
    assert len(found.rates) == 40 and not found.has_diverged and min(found.losses) < 0


def test_a_rate_that_the_runner_makes_is_no_key(tmp_path: Path) -> None:
    found = range_test(
        written(tmp_path, {**TOY, "runner": f"{ROOT}/tests/hungry_runner.py:Scaled"}), count=20
    )
    assert found.key is None


def test_a_batch_size_of_the_split_is_refused_and_short_batches_count_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataloader\.train\.batch_size is stated"):
        batch_search(written(tmp_path, TOY, dataloader={"batch_size": 10, "train": {"batch_size": 5}}))
    trials = batch_search(
        written(tmp_path, {**TOY, "runner": f"{ROOT}/tests/hungry_runner.py:Slow"}), count=4
    )
    assert all(200 < (trial.samples_per_second or 0) < 510 for trial in trials), trials


@pytest.mark.parametrize(
    "ends",
    [
        {"epoch_end": 1},
        {"epoch_end": None, "step_end": 3, "evaluate_interval_steps": 2},
        {"epoch_end": None, "iter_end": 5, "accum_steps": 2},
        {"fast_dev_run": 2},
    ],
)
def test_a_trial_does_not_end_where_the_run_would(tmp_path: Path, ends: Any) -> None:
    found = range_test(written(tmp_path, TOY, **ends), count=40, highest=1e-3)
    assert len(found.rates) == 40
