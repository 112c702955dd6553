"""Real processes for what tests/unit/test_runner_surface.py tries without them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.ranks import Ranks
from tests.small_runner import SmallRunner, config

ROOT = Path(__file__).parents[2]


def place(root: str) -> dict[str, Any]:
    runner = SmallRunner(config(root))
    names = ("world_size", "rank", "local_rank", "distributed", "is_main_process", "is_local_main_process")
    own = {name: getattr(runner, name) for name in (*names, "batch_size_equivalent", "timestamp")}
    return {**own, "device": str(runner.device)}


@pytest.mark.holds("attributes-14", "attributes-23")
def test_ranks_know_their_place(two_ranks: Ranks, tmp_path: Path) -> None:
    first, second = two_ranks.run(place, str(tmp_path))
    assert (first["world_size"], second["world_size"]) == (2, 2)
    assert (first["rank"], second["rank"], first["local_rank"], second["local_rank"]) == (0, 1, 0, 1)
    assert first["distributed"] and first["is_main_process"] and first["is_local_main_process"]
    assert not second["is_main_process"] and not second["is_local_main_process"]
    assert first["batch_size_equivalent"] == 10
    assert first["device"] == second["device"] == "cpu"
    assert first["timestamp"] == second["timestamp"]
    alone = place(str(tmp_path))
    assert alone["world_size"] == 1 and not alone["distributed"] and alone["is_main_process"]


def saved(root: str) -> list[str]:
    runner = SmallRunner(config(root))
    runner.save({"rank": runner.rank}, f"{root}/main.json")
    runner.save({"rank": runner.rank}, f"{root}/own-{runner.rank}.json", main_process_only=False)
    torch.distributed.barrier()
    return sorted(path.name for path in Path(root).glob("*.json"))


@pytest.mark.holds("methods-11")
def test_only_the_main_process_saves_unless_told(two_ranks: Ranks, tmp_path: Path) -> None:
    for names in two_ranks.run(saved, str(tmp_path)):
        assert names == ["main.json", "own-0.json", "own-1.json"]
    assert json.loads((tmp_path / "main.json").read_text()) == {"rank": 0}


def configs(root: str) -> dict[str, Any]:
    runner = SmallRunner(config(root, seed=3))
    for name in ("same", f"rank-{runner.rank}"):
        runner.json(f"{root}/{name}.json")
        runner.yaml(f"{root}/{name}.yaml")
    torch.distributed.barrier()
    return runner.dict()


@pytest.mark.holds("methods-17")
def test_the_config_is_written_by_the_main_rank_alone(two_ranks: Ranks, tmp_path: Path) -> None:
    first, second = two_ranks.run(configs, str(tmp_path))
    names = ["rank-0.json", "rank-0.yaml", "same.json", "same.yaml"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert json.loads((tmp_path / "same.json").read_text())["seed"] == 3
    assert yaml.safe_load((tmp_path / "same.yaml").read_text())["dataloader"]["batch_size"] == 5
    for made in (
        SmallRunner.from_json(tmp_path / "same.json"),
        SmallRunner.from_yaml(tmp_path / "same.yaml"),
    ):
        assert made.dict() == first == second


def spoken(root: str, process: int) -> str:
    import io
    from contextlib import redirect_stderr

    heard = io.StringIO()
    with redirect_stderr(heard):
        runner = SmallRunner(config(root, epoch_end=1))
        runner.init_print(process)
        original = SmallRunner.train_epoch

        def speaks(split: str = "train") -> Any:
            runner.logger.info("hello from %d", runner.rank)
            return original(runner, split)

        runner.train_epoch = speaks  # type: ignore[method-assign]
        runner.train()
    return heard.getvalue()


@pytest.mark.holds("methods-8")
@pytest.mark.parametrize("process", [0, 1])
def test_init_print_chooses_the_rank_that_speaks(process: int, two_ranks: Ranks, tmp_path: Path) -> None:
    outputs = two_ranks.run(spoken, str(tmp_path), process)
    assert f"hello from {process}" in outputs[process]
    assert "hello" not in outputs[1 - process]


@pytest.mark.long
@pytest.mark.holds("methods-7", "bugs-12")
def test_a_script_under_torchrun_leaves_its_process_group(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.small_runner import SmallRunner, config\n"
        f"runner = SmallRunner(config({str(tmp_path)!r}, params={{'samples': 40}}, max_seconds=1e-6))\n"
        "try:\n    runner.train()\nexcept Exception as error:\n    print('ENDED', type(error).__name__)\n"
        f"runner = SmallRunner(config({str(tmp_path)!r}, params={{'samples': 40}}))\n"
        "runner.train()\n"
        "print('DONE', runner.rank, runner.steps)\n"
    )
    options = ["--standalone", "--nproc-per-node=2"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ENDED RunInterrupted") == 2  # max_seconds stopped both
    assert "DONE 0 8" in done.stdout and "DONE 1 8" in done.stdout
    assert "destroy_process_group" not in done.stderr
