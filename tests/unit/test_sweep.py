"""Experiment and group files, expanded into the configs of all runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from danling_core.config import Config
from danling_core.config.documents import dump_yaml
from danling_core.config.sweep import ExperimentSpec, GroupSpec
from danling_core.errors import ConfigError
from tests.small_runner import EXPERIMENT_ID, SmallRunner, events

MLP: dict[str, Any] = {
    "experiment_name": "mlp",
    "runner": "a:MLP",
    "epoch_end": 2,
    "optim": {"name": "sgd", "lr": 0.1},
}
CNN: dict[str, Any] = {
    "experiment_name": "cnn",
    "runner": "a:CNN",
    "epoch_end": 2,
    "params": {"width": 8, "depth": 2},
}
GROUP: dict[str, Any] = {
    "group": "digits-lr",
    "concurrency": 2,
    "experiments": [
        {"config": "mlp.yaml", "sweep": {"optim.lr": [1e-3, 3e-3], "seed": [0, 1]}},
        {"config": "sub/cnn.yaml", "runs": [{"params.width": 16}, {"params": {"width": 32}}]},
    ],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "mlp.yaml").write_text(dump_yaml(MLP))
    (tmp_path / "sub" / "cnn.yaml").write_text(dump_yaml(CNN))
    return tmp_path


def write(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "spec.yaml").write_text(dump_yaml(values))
    return folder / "spec.yaml"


def test_a_group_file_gives_the_configs_of_all_runs(folder: Path) -> None:
    spec = GroupSpec.load(write(folder, GROUP))
    mlp, cnn = spec.configs()
    assert (mlp.name, cnn.name, spec.concurrency) == ("mlp", "cnn", 2)
    assert [config.run_name for config in mlp.configs] == [
        "run-lr=0.001-seed=0",
        "run-lr=0.001-seed=1",
        "run-lr=0.003-seed=0",
        "run-lr=0.003-seed=1",
    ]
    assert [config.params for config in cnn.configs] == [{"width": 16, "depth": 2}, {"width": 32, "depth": 2}]
    assert {config.group for plan in (mlp, cnn) for config in plan.configs} == {"digits-lr"}


def test_a_loaded_spec_needs_its_files_no_more_and_is_json(folder: Path) -> None:
    spec = GroupSpec.load(write(folder, GROUP))
    for name in ("mlp.yaml", "sub/cnn.yaml", "spec.yaml"):
        (folder / name).unlink()
    again = GroupSpec(**json.loads(json.dumps(spec.model_dump(mode="json"))))
    assert again == spec and again.configs() == spec.configs()
    json.dumps(GroupSpec.model_json_schema())


def test_an_experiment_file_is_one_entry(folder: Path) -> None:
    values = {
        "config": "mlp.yaml",
        "sweep": {"seed": [0, 1, 2]},
        "concurrency": 3,
        "overrides": {"optim.lr": 0.5},
    }
    spec = ExperimentSpec.load(write(folder, values))
    configs = spec.configs()
    assert [config.seed for config in configs] == [0, 1, 2]
    assert {config.optim.lr for config in configs if config.optim} == {0.5}
    assert spec.plan("g").configs[0].group == "g" and configs[0].group is None


def test_overrides_of_the_caller_come_after_those_of_the_file_and_before_what_varies(folder: Path) -> None:
    values = {"config": "mlp.yaml", "sweep": {"seed": [1, 2]}, "overrides": ["optim.lr=0.5", "patience=1"]}
    configs = ExperimentSpec.load(
        write(folder, values), ["optim.lr=0.7", "seed=9", "experiments_root=x"]
    ).configs()
    assert [(c.seed, c.optim and c.optim.lr, c.patience, c.project_root) for c in configs] == [
        (1, 0.7, 1, "x"),
        (2, 0.7, 1, "x"),
    ]


@pytest.mark.parametrize(
    ("axis", "values"), [("seed", [0, 1]), ("params.width", [4, 0]), ("ema_decay", [None, 0.9])]
)
def test_a_new_axis_keeps_the_runs_that_are_there(tmp_path: Path, axis: str, values: list[Any]) -> None:
    def trained(sweep: dict[str, Any]) -> dict[str, SmallRunner]:
        shared = {"project_root": str(tmp_path), "epoch_end": 1, "dataloader": {"batch_size": 5}}
        known = {**shared, "experiment_id": EXPERIMENT_ID, "device": "cpu", "sanity_batches": 0}
        spec = ExperimentSpec(config={**known, "optim": {"name": "sgd", "lr": 0.1}}, sweep=sweep)
        runners = [SmallRunner(one) for one in spec.configs()]
        for runner in runners:
            runner.train()
        return {runner.dir: runner for runner in runners}

    rates = {"optim.lr": [0.1, 0.2]}
    first = trained(rates)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    second = trained({**rates, axis: values})
    assert len(first) == 2 and len(second) == 4 and first.keys() < second.keys()
    for folder, runner in second.items():
        assert len(events(runner, "run_started")) == 1
        assert folder not in first or runner.results == first[folder].results
    kept = {path: path.stat().st_mtime_ns for path in files if not path.name.endswith(".log")}
    assert kept.items() <= files.items(), "nothing was trained again"


def test_an_experiment_without_variation_is_one_run() -> None:
    (config,) = ExperimentSpec(config={**MLP, "run_name": "only"}).configs()
    assert config.run_name == "only"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"config": MLP, "sweep": {"seed": [0]}, "runs": [{}]}, "sweep and runs are both given"),
        ({"config": MLP, "runs": []}, "wanted one or more runs"),
        ({"config": MLP, "sweep": {"seed": [0, 0]}}, "are the same"),
        ({"config": MLP, "sweep": {"optim.lr": [1, 1.0]}}, "are the same"),
        ({"config": MLP, "sweep": {"sead": [0, 1]}}, "unknown key 'sead': did you mean 'seed'"),
        (
            {"config": MLP, "sweep": {"seed": [0, -1]}},
            "run 2 (run-seed=-1): seed: wanted a number >= 0, found -1",
        ),
        ({"config": MLP, "swep": {"seed": [0]}}, "unknown key 'swep': did you mean 'sweep'"),
        ({"config": "gone.yaml"}, "gone.yaml: cannot be read"),
        ({"config": 3}, "config: wanted a mapping of keys, found 3"),
        ({"config": MLP, "concurrency": 0}, "concurrency: wanted a number >= 1, found 0"),
        ({}, "config: is missing"),
        ({"config": MLP, "overrides": [{"params.lr": 0.01}]}, "wanted 'key=value', found a dict"),
        ({"config": MLP, "overrides": "seed=1"}, "overrides: wanted a mapping or a list of 'key=value'"),
        ({"config": MLP, "overrides": 3}, "overrides: wanted a mapping or a list of 'key=value'"),
        (MLP, "this is the file of a run: `danling run FILE`"),
        (GROUP, "this is the file of a group: `danling group FILE`"),
    ],
)
def test_a_bad_experiment_is_refused_in_one_message(
    folder: Path, values: dict[str, Any], message: str
) -> None:
    file = write(folder, values)
    for overrides in ([], ["patience=3"]):
        with pytest.raises(ConfigError) as caught:
            ExperimentSpec.load(file, overrides)
        assert message in str(caught.value) and str(caught.value).count(str(file)) == 1


def test_a_bad_experiment_of_a_group_is_named(folder: Path) -> None:
    bad = {
        **GROUP,
        "experiments": [GROUP["experiments"][0], {"config": "sub/cnn.yaml", "sweep": {"seed": [-1]}}],
    }
    with pytest.raises(ConfigError, match=r"spec.yaml: experiments\.1: seed: wanted a number >= 0"):
        GroupSpec.load(write(folder, bad))
    with pytest.raises(ConfigError, match="experiments: wanted 1 or more"):
        GroupSpec(group="g", experiments=[])
    with pytest.raises(ConfigError, match="are the same"):
        GroupSpec(group="g", experiments=[{"config": MLP}, {"config": MLP}]).configs()


def test_a_name_makes_no_other_run() -> None:
    spec = ExperimentSpec(config=MLP, runs=[{"run_name": "first"}, {"run_name": "second"}])
    with pytest.raises(ConfigError, match="'first' and 'second' .* are the same"):
        spec.configs()


def test_two_experiments_of_a_group_may_share_a_run() -> None:
    shared = {"config": MLP}, {"config": {**MLP, "experiment_name": "other"}}
    assert len(GroupSpec(group="g", experiments=[*shared]).configs()) == 2


def test_a_file_of_another_kind_is_named_with_its_command(folder: Path) -> None:
    with pytest.raises(ConfigError, match="file of a group: `danling group FILE`"):
        Config.load(write(folder, GROUP))
    with pytest.raises(ConfigError, match="file of an experiment: `danling experiment FILE`"):
        GroupSpec.load(write(folder, {"config": MLP, "sweep": {"seed": [0, 1]}}))
    with pytest.raises(ConfigError, match="file of an experiment: `danling experiment FILE`"):
        Config.load(write(folder, {"config": "mlp.yaml"}))


def test_a_run_is_swept_by_words(folder: Path) -> None:
    file = write(folder, {**MLP, "run_name": "base"})
    words = ["optim.lr=1e-3,3e-3", "optim.name=sgd,adamw", "params.sizes=[1,2],[3]"]
    configs = ExperimentSpec.load(file, ["seed=4"], sweep=words).configs()
    assert len(configs) == 8 and {config.seed for config in configs} == {4}
    assert configs[0].run_name.startswith("base-lr=0.001-name=sgd-sizes=")
    tried = [
        (config.optim and (config.optim.lr, config.optim.name), config.params["sizes"]) for config in configs
    ]
    assert tried[0] == ((1e-3, "sgd"), [1, 2]) and tried[-1] == ((3e-3, "adamw"), [3])
    spec = write(folder, {"config": "mlp.yaml"})
    assert [c.seed for c in ExperimentSpec.load(spec, sweep=["seed=0,1"]).configs()] == [0, 1]
    with pytest.raises(ConfigError, match="--sweep: 'seed' is given twice"):
        ExperimentSpec.load(spec, sweep=["seed=0,1", "seed=2"])
    with pytest.raises(ConfigError, match="has a sweep or runs of its own"):
        ExperimentSpec.load(write(folder, {"config": MLP, "runs": [{"seed": 1}]}), sweep=["seed=0,1"])
