"""The digits: their data, their files, and what a run of them reaches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from danling_core.config import Config
from danling_core.config.sweep import ExperimentSpec, GroupSpec
from danling_core.errors import ConfigError
from examples.digits import CNNRunner
from examples.digits.data import digits, shifted
from scripts import make_schedules
from tests.small_runner import SmallRunner
from tests.small_runner import config as small_config

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples" / "digits"


def test_the_splits_share_no_sample_and_are_the_same_each_time() -> None:
    first, second = digits(), digits()
    assert {name: len(split) for name, split in first.items()} == {"train": 1221, "val": 216, "test": 360}
    for name, split in first.items():
        assert torch.equal(split.images, second[name].images)
        assert torch.equal(split.labels, second[name].labels)
        assert split.labels.bincount().min() >= len(split) // 11  # stratified


def test_a_sample_is_an_image_between_0_and_1_with_its_label() -> None:
    image, label = digits()["val"][0]
    assert image.shape == (1, 8, 8)
    assert image.min() >= 0 and image.max() <= 1
    assert label.dtype == torch.long


def test_a_shift_moves_whole_images_by_at_most_so_many_pixels() -> None:
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 4, 4] = 1.0
    torch.manual_seed(0)
    moved = shifted(image.expand(500, 1, 8, 8), max_shift=1)
    assert torch.equal(moved.sum(dim=(1, 2, 3)), torch.ones(500))
    rows, columns = moved.nonzero()[:, 2], moved.nonzero()[:, 3]
    seen = {(int(row), int(column)) for row, column in zip(rows, columns, strict=True)}
    assert seen == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}


def test_the_group_and_the_experiment_expand_to_their_runs() -> None:
    group = GroupSpec.load(str(DIGITS / "group.yaml"))
    plans = group.configs()
    assert [len(plan.configs) for plan in plans] == [4, 2]
    assert len({config.run_name for plan in plans for config in plan.configs}) == 6
    experiment = ExperimentSpec.load(str(DIGITS / "experiment.yaml"))
    assert len(experiment.configs()) == 4


def test_a_width_that_the_cnn_cannot_have_is_refused_by_name(tmp_path: Path) -> None:
    config = Config.load(str(DIGITS / "run.yaml"), ["params.width=6", f"project_root={tmp_path}"])
    with pytest.raises(ConfigError, match=r"params\.width"):
        CNNRunner(config)


def test_the_page_on_training_says_what_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line of YAML is a config, and the callback and the step do what they say."""
    found = re.findall(r"```(python|yaml)\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), flags=re.S)
    lines = [line for kind, text in found if kind == "yaml" for line in text.splitlines()]
    for line in lines:
        Config.load({"epoch_end": 1, **yaml.safe_load(line)})
    assert len(lines) > 10
    pieces = [text for kind, text in found if kind == "python"]
    step, hook = pieces[0], next(text for text in pieces if "class Unfreeze" in text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hooks.py").write_text(hook.replace(".backbone", ""))
    namespace: dict[str, Any] = {}
    exec(step, namespace)

    class Both(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> Any:
            return input, super().forward(input)

    class Stepping(SmallRunner):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = Both(2, 2)
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

        def train_step(self, data: Any) -> Any:
            return namespace["train_step"](self, data)

        def evaluate_step(self, data: Any) -> Any:
            prediction = self.model(data[0])[1]
            self.update_metrics(prediction, data[1])
            return prediction, None

    runner = Stepping(
        small_config(tmp_path, score_name="accuracy", callbacks=[{"name": "hooks.py:Unfreeze", "at": 1}])
    )
    runner.train()
    assert {"feature_norm", "hardest", "token_loss", "loss"} <= runner.results[1]["train"].keys()


def test_the_smallest_runner_of_the_readme_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.findall(r"```(python|yaml)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    blocks = dict(reversed(found))  # the first of each
    sweep, group = [text for kind, text in found if kind == "yaml"][1:]
    (tmp_path / "toy.py").write_text(blocks["python"])
    (tmp_path / "toy.yaml").write_text(blocks["yaml"])
    (tmp_path / "sweep.yaml").write_text(sweep)
    (tmp_path / "group.yaml").write_text(group)
    monkeypatch.chdir(tmp_path)
    assert len(ExperimentSpec.load("sweep.yaml").configs()) == 4
    assert [len(plan.configs) for plan in GroupSpec.load("group.yaml").configs()] == [2, 1]
    namespace: dict[str, type] = {"__name__": "toy"}
    exec(compile(blocks["python"], str(tmp_path / "toy.py"), "exec"), namespace)
    results = namespace["ToyRunner"](Config.load("toy.yaml", ["nproc_per_node=1"])).train()
    assert list(results) == [0, 1, 2, 3, 4]
    assert results[4]["val"]["loss"] < results[0]["val"]["loss"]


def test_the_picture_of_the_schedules_is_that_of_the_page() -> None:
    assert make_schedules.stated() and make_schedules.PICTURE.read_text() == make_schedules.picture()
