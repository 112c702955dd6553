"""Every name that a runner offers: declared in one place, described, there, and of the promised meaning."""

from __future__ import annotations

import builtins
import inspect
import json
import logging
import os
import signal
import sys
import uuid
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import danling_core as dl
from danling_core import storage
from danling_core.config import Config
from danling_core.errors import CheckpointError, ConfigError
from danling_core.runner.base import From, RunnerBase, RunnerMode
from tests.small_runner import EXPERIMENT_ID, SmallRunner, config, events, weights

# Section 3 of the specification, name by name.
ATTRIBUTES = """
id name uuid timestamp seed deterministic mode config iters steps epochs iter_end step_end epoch_end
iter_begin step_begin epoch_begin total_iters total_steps total_epochs progress model ema criterion
optimizer scheduler datasets datasamplers dataloaders split batch_size batch_size_equivalent accum_steps
results latest_result best_result scores latest_score best_score best_index best_fn is_best score_split
score_name world_size rank local_rank distributed is_main_process is_local_main_process project_root
experiments_root dir checkpoint_dir checkpoint_dir_name log_path log logger tensorboard writer meters
metrics train_metrics evaluate_metrics log_interval save_interval
""".split()  # noqa: SIM905
METHODS = """
unwrap train train_epoch train_step advance backward evaluate evaluate_epoch evaluate_step infer set_seed
set_deterministic scale_lr init_distributed init_logging init_print init_tensorboard state_dict save load
save_checkpoint load_checkpoint load_pretrained load_config from_checkpoint save_result append_result
print_result get_step_result get_epoch_result step_log format_step_result format_epoch_result format_result
write_result write_score json jsons yaml yamls from_json from_jsons from_yaml from_yamls dict check_dir
""".split()  # noqa: SIM905


@pytest.mark.holds("attributes-1")
def test_every_attribute_is_declared_with_its_type_and_there(tmp_path: Path) -> None:
    held = {name: member for name, member in vars(RunnerBase).items() if isinstance(member, From)}
    assert set(ATTRIBUTES) <= set(inspect.get_annotations(RunnerBase))
    assert all(inspect.getdoc(member) for member in held.values())
    runner = SmallRunner(config(tmp_path))
    assert not [name for name in ATTRIBUTES if not hasattr(runner, name)]


@pytest.mark.holds("methods-1")
def test_every_method_is_declared_with_its_meaning_and_there() -> None:
    assert all(inspect.getdoc(getattr(dl.TorchRunner, name)) for name in METHODS)


@pytest.mark.holds("methods-1")
def test_signatures_that_users_know() -> None:
    known = {
        "append_result": "(self, result, index=None)",
        "set_seed": "(self, seed=None, bias=None)",
        "scale_lr": "(self, lr, lr_scale_factor=None, batch_size_base=None)",
        "check_dir": "(self, action='warn')",
        "save": "(self, obj, file, main_process_only=True)",
        "init_print": "(self, process=0)",
        "step_log": "(self, split, iteration, length=None)",
        "save_checkpoint": "(self, name='latest', epochs=None, save_best=True)",
        "load_config": "(self, checkpoint, overwrite=False)",
        "train": "(self, train_splits=None, evaluate_splits=None)",
    }
    for name, wanted in known.items():
        parameters = inspect.signature(getattr(dl.TorchRunner, name)).parameters.values()
        plain = inspect.Signature([p.replace(annotation=p.empty) for p in parameters])
        assert str(plain) == wanted


@pytest.mark.holds("attributes-1")
def test_runner_is_the_platforms_runner_and_bases_are_for_nobody(tmp_path: Path) -> None:
    assert dl.Runner is dl.TorchRunner and issubclass(dl.TorchRunner, dl.BaseRunner)
    assert issubclass(dl.BaseRunner, dl.RunnerBase)
    with pytest.raises(NotImplementedError, match="subclass TorchRunner"):
        dl.BaseRunner(config(tmp_path))


def test_an_attribute_that_follows_from_the_run_cannot_be_set_nor_used_too_early(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    with pytest.raises(AttributeError, match=r"self\.steps follows from"):
        runner.steps = 3

    class Hasty(dl.TorchRunner):
        def __init__(self, config: Any) -> None:
            self.datasets["train"] = []

    with pytest.raises(AttributeError, match=r"before super\(\).__init__\(config\) was called in Hasty"):
        Hasty(config(tmp_path))


def test_a_subclass_may_call_its_own_things_as_it_likes(tmp_path: Path) -> None:
    own = "_weight _step _files _state _count _progress _streams _context _results _stopping _log".split()  # noqa: SIM905

    class Own(SmallRunner):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for name in own:
                setattr(self, name, object())

    runner = Own(config(tmp_path))
    assert runner.train() == SmallRunner(config(tmp_path / "plain")).train()


def test_a_second_init_distributed_changes_nothing(tmp_path: Path) -> None:
    class Twice(SmallRunner):
        def train_epoch(self, split: str = "train") -> dict[str, Any]:
            self.init_distributed()
            return super().train_epoch(split)

    runner = Twice(config(tmp_path))
    assert runner.train() == SmallRunner(config(tmp_path / "plain")).train()
    assert runner.steps == 8


# general ------------------------------------------------------------------------------------------
@pytest.mark.holds("attributes-2")
def test_names_and_ids_follow_from_code_and_config(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, experiment_name="digits", run_name="small"))
    assert runner.name == "digits-small"
    assert len(runner.identity.run_id) == 32 and int(runner.identity.run_id, 16)
    assert runner.id == EXPERIMENT_ID[:8] + runner.identity.run_id[:8]
    assert runner.uuid == uuid.uuid5(uuid.UUID(runner.identity.run_id), runner.id)
    assert SmallRunner(config(tmp_path / "else", log_interval=3)).id == SmallRunner(config(tmp_path)).id
    assert SmallRunner(config(tmp_path, seed=1)).id != SmallRunner(config(tmp_path)).id
    assert len(runner.timestamp) == len("20261121-103249-123456") and runner.timestamp[:4].isdigit()


@pytest.mark.holds("attributes-24")
def test_folders_follow_from_the_names_and_the_config_overrides_them(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, checkpoint_dir_name="kept"))
    folder = f"{tmp_path}/experiment-run-{runner.id}/{runner.timestamp}"
    assert (runner.dir, runner.checkpoint_dir) == (folder, f"{folder}/kept")
    assert runner.log_path == f"{folder}/run.log"
    assert runner.project_root == runner.experiments_root == str(tmp_path)
    own = {
        "name": "mine",
        "dir": f"{tmp_path}/d",
        "log_path": f"{tmp_path}/l",
        "checkpoint_dir": f"{tmp_path}/c",
    }
    stated = SmallRunner(config(tmp_path, **own))
    assert [stated.name, stated.dir, stated.log_path, stated.checkpoint_dir] == list(own.values())
    stated.train()
    assert Path(own["dir"], "results.json").exists() and Path(own["checkpoint_dir"], "latest.json").exists()
    assert "epoch" in Path(own["log_path"]).read_text()
    again = SmallRunner(config(tmp_path, **own))
    again.train()
    assert again.timestamp == stated.timestamp


@pytest.mark.holds("attributes-24")
def test_the_older_name_of_the_root_is_accepted(tmp_path: Path) -> None:
    values = {"experiments_root": str(tmp_path), "epoch_end": 1, "experiment_id": EXPERIMENT_ID}
    assert SmallRunner(values).project_root == str(tmp_path)


@pytest.mark.holds("attributes-5")
def test_a_runner_takes_a_config_a_mapping_or_a_file(tmp_path: Path) -> None:
    given = config(tmp_path)
    given.yaml(tmp_path / "run.yaml")
    for source in (given, given.dict(), str(tmp_path / "run.yaml"), tmp_path / "run.yaml"):
        assert SmallRunner(source).id == SmallRunner(given).id


@pytest.mark.holds("attributes-5")
def test_params_are_typed_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    assert SmallRunner(config(tmp_path, params={"width": 3})).params.width == 3
    with pytest.raises(ConfigError, match="widht.*did you mean 'width'"):
        SmallRunner(config(tmp_path, params={"widht": 3}))


@pytest.mark.holds("attributes-4")
def test_the_mode_and_split_say_what_is_going_on(tmp_path: Path) -> None:
    seen: set[tuple[str, str | None, bool]] = set()

    class Looks(SmallRunner):
        def __init__(self, given: Any) -> None:
            super().__init__(given)
            self.model.register_forward_hook(
                lambda *_: seen.add((self.mode, self.split, self.model.training))
            )

    runner = Looks(config(tmp_path))
    assert runner.mode is RunnerMode.train and runner.split is None
    runner.train()
    runner.infer("val")
    assert seen == {("train", "train", True), ("evaluate", "val", False), ("infer", "val", False)}


@pytest.mark.holds("attributes-14")
def test_sizes_of_batches(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, accum_steps=3))
    assert (runner.batch_size, runner.accum_steps, runner.batch_size_equivalent) == (5, 3, 15)


@pytest.mark.holds("attributes-25")
def test_settings_of_logging_are_shown(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, log=False, log_interval=7, save_interval=2))
    shown = (runner.log, runner.log_interval, runner.save_interval, runner.tensorboard)
    assert shown == (False, 7, 2, False)
    assert runner.logger.name == "danling"
    runner.train()
    assert not Path(runner.dir, "run.log").exists()


# files --------------------------------------------------------------------------------------------
@pytest.mark.holds("methods-11")
@pytest.mark.parametrize("suffix", [".json", ".yaml", ".pt", ".ckpt"])
def test_save_and_load_go_by_the_suffix(suffix: str, tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    for root in (str(tmp_path / "new" / "folder"), "memory://surface"):
        file = f"{root}/thing{suffix}"
        assert runner.save({"a": [1, 2.5, None], "b": "text"}, file) == file
        assert runner.load(file) == {"a": [1, 2.5, None], "b": "text"}


@pytest.mark.holds("methods-11")
def test_tensors_are_saved_and_code_is_not_loaded(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.save({"weight": torch.arange(3)}, tmp_path / "w.pt")
    assert torch.equal(runner.load(tmp_path / "w.pt")["weight"], torch.arange(3))
    torch.save({"code": os.system}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        runner.load(tmp_path / "evil.pt")
    with pytest.raises(ConfigError, match="how is .xyz written"):
        runner.save({}, tmp_path / "a.xyz")


@pytest.mark.holds("methods-11")
@pytest.mark.parametrize("root", ["local", "memory://surface"])
def test_arrays_tables_and_weights_go_by_the_suffix_too(root: str, tmp_path: Path) -> None:
    runner, place = SmallRunner(config(tmp_path)), str(tmp_path / "new") if root == "local" else root
    for array in (torch.arange(6).reshape(2, 3).double(), [[1, 2], [3, 4]], 2.5):
        file = runner.save(array, f"{place}/array.npy")
        assert runner.load(file).tolist() == torch.as_tensor(array).tolist()
    weights = {"a": torch.ones(2, 3).t(), "b": torch.arange(3)}
    loaded = runner.load(runner.save(weights, f"{place}/weights.safetensors"))
    assert loaded.keys() == weights.keys() and all(
        torch.equal(loaded[name], weights[name]) for name in weights
    )
    rows = [{"name": "a, b", "count": 3, "rate": 0.1}, {"name": "c", "count": 4, "rate": 2.0}]
    assert runner.load(runner.save(rows, f"{place}/rows.csv")) == rows
    columns = {"x": torch.tensor([1, 2]), "y": [0.5, 0.25]}
    assert runner.load(runner.save(columns, f"{place}/columns.csv")) == [
        {"x": 1, "y": 0.5},
        {"x": 2, "y": 0.25},
    ]
    state = runner.unwrap(runner.model).state_dict()
    runner.save(
        {name: torch.full_like(value, 3.0) for name, value in state.items()}, f"{place}/w.safetensors"
    )
    runner.load_pretrained(f"{place}/w.safetensors")
    assert runner.model.weight.tolist() == [[3.0, 3.0], [3.0, 3.0]]


@pytest.mark.parametrize(
    ("name", "obj", "message"),
    [
        ("a.pkl", {}, "a pickle runs code when it is loaded: use .pt"),
        ("a.npy", [object()], "npy holds one array of numbers, not a list of objects"),
        ("a.npy", [[1], [2, 3]], "npy holds one array of numbers"),
        ("a.safetensors", [torch.ones(1)], "safetensors holds a mapping of names to tensors, not a list"),
        ("a.safetensors", {"a": 1.0}, "safetensors holds a mapping of names to tensors"),
        ("a.csv", 3, "csv holds a list of rows or a mapping of columns, not a int"),
        ("a.csv", {"x": [1], "y": [1, 2]}, "the columns of a table are equally long"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(name: str, obj: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        SmallRunner(config(tmp_path)).save(obj, tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.holds("methods-17")
def test_the_config_goes_to_files_and_text_and_back(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, optim={"name": "sgd", "lr": 1e-3}))
    runner.json(tmp_path / "c.json")
    runner.yaml(tmp_path / "c.yaml")
    twins = [
        SmallRunner.from_json(tmp_path / "c.json"),
        SmallRunner.from_yaml(tmp_path / "c.yaml"),
        SmallRunner.from_jsons(runner.jsons()),
        SmallRunner.from_yamls(runner.yamls()),
    ]
    for twin in twins:
        assert type(twin) is SmallRunner and twin.config == runner.config
    assert runner.dict() == runner.config.dict() == Config.from_dict(runner.dict()).dict()
    assert type(dl.Runner.from_yaml(tmp_path / "c.yaml")).__name__ == "SmallRunner"


@pytest.mark.holds("methods-18")
def test_check_dir_tells_whether_the_folder_is_empty(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, dir=str(tmp_path / "run")))
    assert runner.check_dir() and runner.check_dir("raise")
    (tmp_path / "run").mkdir()
    assert runner.check_dir()
    (tmp_path / "run" / "file").touch()
    with pytest.warns(UserWarning, match="not empty"):
        assert not runner.check_dir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not runner.check_dir("ignore")
    with pytest.raises(ConfigError, match="not empty"):
        runner.check_dir("raise")
    with pytest.raises(ConfigError, match="warn, raise, ignore"):
        runner.check_dir("wran")  # type: ignore[arg-type]


# checkpoints --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SmallRunner:
    """A run of 3 epochs that ended well."""
    runner = SmallRunner(config(tmp_path_factory.mktemp("finished"), epoch_end=3, seed=5, save_interval=1))
    runner.train()
    return runner


def data_file(runner: SmallRunner) -> str:
    return str(max(Path(runner.checkpoint_dir, "data").glob("*/*.pt")))


@pytest.mark.holds("methods-13")
def test_from_checkpoint_has_config_and_weights(finished: SmallRunner) -> None:
    for source in (finished.dir, finished.checkpoint_dir, data_file(finished)):
        twin = SmallRunner.from_checkpoint(source)
        assert twin.config == finished.config and twin.seed == 5
        assert weights(twin) == weights(finished)
    assert type(dl.Runner.from_checkpoint(finished.dir)).__name__ == "SmallRunner"


@pytest.mark.holds("methods-13")
def test_from_checkpoint_reads_any_url(finished: SmallRunner) -> None:
    folder = Path(finished.dir)
    for file in folder.rglob("*"):
        if file.is_file():
            storage.put_file(str(file), f"memory://bucket/run/{file.relative_to(folder)}")
    twin = SmallRunner.from_checkpoint("memory://bucket/run")
    assert weights(twin) == weights(finished)
    name = Path(data_file(finished)).relative_to(folder)
    assert weights(SmallRunner.from_checkpoint(f"memory://bucket/run/{name}")) == weights(finished)
    again = SmallRunner(config("memory://else", seed=5))
    again.load_checkpoint("memory://bucket/run")
    assert again.steps == finished.steps and weights(again) == weights(finished)


@pytest.mark.holds("methods-10")
def test_load_checkpoint_takes_over_the_whole_state(finished: SmallRunner, tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, epoch_end=5, seed=5))
    runner.load_checkpoint(finished.dir)
    assert (runner.steps, runner.epochs, runner.results) == (12, 3, finished.results)
    runner.train()
    assert list(runner.results) == [0, 1, 2, 3, 4] and len(runner.gradients) == 12 + 8
    whole = SmallRunner(config(tmp_path / "whole", epoch_end=5, seed=5))
    whole.train()
    assert weights(whole) == weights(runner)


@pytest.mark.holds("methods-10")
def test_a_runs_own_checkpoint_wins_over_one_loaded_by_hand(finished: SmallRunner, tmp_path: Path) -> None:
    class Stops(SmallRunner):
        def train_epoch(self, split: str = "train") -> Any:
            if self.epochs == 4 and not self.resumed:
                raise KeyboardInterrupt
            return super().train_epoch(split)

    for expected in (KeyboardInterrupt, None):
        runner = Stops(config(tmp_path, epoch_end=5, seed=5))
        runner.load_checkpoint(finished.dir)
        if expected:
            with pytest.raises(expected):
                runner.train()
    runner.train()
    assert runner.resumed is not None and runner.resumed["epoch"] == 4
    assert len(runner.gradients) == 16 + 4


@pytest.mark.holds("methods-10")
def test_state_dict_is_what_a_checkpoint_holds(finished: SmallRunner) -> None:
    state = finished.state_dict()
    wanted = {"model", "ema", "optimizer", "scheduler", "scalers", "progress", "results", "streams"}
    assert wanted <= set(state) and state["progress"]["steps"] == 12
    again = SmallRunner(finished.config)
    again.load_checkpoint({**state, "ranks": []})
    assert weights(again) == weights(finished)


@pytest.mark.holds("methods-10")
def test_load_checkpoint_refuses_what_is_none(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    with pytest.raises(CheckpointError, match="no committed checkpoint"):
        runner.load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="load_pretrained takes weights"):
        runner.load_checkpoint(runner.model.state_dict())


@pytest.mark.holds("methods-12")
def test_load_pretrained_takes_weights_only(finished: SmallRunner, tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    keys = runner.load_pretrained(finished.dir)
    assert keys == ([], []) and weights(runner) == weights(finished)
    assert (runner.steps, runner.results) == (0, {})
    runner.evaluate()
    assert weights(runner) == weights(finished)
    runner.train()
    assert runner.steps == 8


@pytest.mark.holds("methods-12")
def test_partial_weights_are_listed(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    given = {"weight": torch.ones(2, 2), "bias": torch.ones(5), "head.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"missing \['bias'\].*unexpected.*\['bias', 'head.weight'\]"):
        runner.load_pretrained(given)
    keys = runner.load_pretrained(given, strict=False)
    assert (keys.missing, keys.unexpected) == (["bias"], ["bias", "head.weight"])
    assert runner.model.weight.tolist() == torch.ones(2, 2).tolist()
    with pytest.raises(CheckpointError, match="nothing fits"):
        runner.load_pretrained({"other": torch.ones(1)}, strict=False)


@pytest.mark.holds("methods-12")
@pytest.mark.parametrize("wrap", ["plain", "state_dict", "prefix"])
def test_weights_of_others_making_are_found(wrap: str, tmp_path: Path) -> None:
    runner, state = SmallRunner(config(tmp_path)), nn.Linear(2, 2).state_dict()
    given: dict[str, Any] = {"plain": state, "state_dict": {"state_dict": state, "epoch": 3}}.get(wrap) or {
        f"module.{name}": value for name, value in state.items()
    }
    torch.save(given, tmp_path / "weights.pth")
    assert runner.load_pretrained(tmp_path / "weights.pth") == ([], [])
    assert torch.equal(runner.model.weight, state["weight"])


@pytest.mark.holds("methods-12")
def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, ema_decay=0.9))
    runner.train()
    twin = SmallRunner(config(tmp_path / "b"))
    twin.load_pretrained(runner.dir)
    assert torch.equal(twin.model.weight, runner.ema.module.weight)


@pytest.mark.holds("methods-13")
def test_load_config_replaces_what_was_not_stated(finished: SmallRunner, tmp_path: Path) -> None:
    mine = {"project_root": str(tmp_path), "step_end": 9, "params": {"width": 2}}
    runner = SmallRunner(mine)
    runner.load_config(finished.dir)
    assert (runner.seed, runner.step_end, runner.params.width) == (5, 9, 2)
    assert runner.config.epoch_end is None and runner.config.dataloader.batch_size == 5
    runner.load_config(finished.dir, overwrite=True)
    assert runner.config == finished.config and runner.params.width == 0
    assert runner.id == finished.id and runner.config.epoch_end == 3
    with pytest.raises(ConfigError, match="comes before training"):
        finished.load_config(finished.dir)


# output -------------------------------------------------------------------------------------------


@pytest.mark.holds("methods-8", "methods-19", "bugs-9")
def test_the_interpreter_is_left_as_it_was(tmp_path: Path) -> None:
    before = interpreter()
    runner = SmallRunner(config(tmp_path))
    assert interpreter() == before
    runner.init_print()
    runner.train()
    assert interpreter() == before


def interpreter() -> list[Any]:
    """What a library has no business to change."""
    loggers = [
        (each.level, list(each.handlers), each.propagate) for each in map(logging.getLogger, ("", "danling"))
    ]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    return [builtins.print, sys.stdout, sys.stderr, sys.excepthook, *handlers, *loggers]


@pytest.mark.holds("methods-19")
def test_attributes_do_not_fall_through_to_the_config(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    assert runner.config.keep_last and not hasattr(runner, "keep_last")
    assert runner.params.samples and not hasattr(runner, "samples")


def test_emit_adds_to_the_event_log(tmp_path: Path) -> None:
    class Emits(SmallRunner):
        def train_epoch(self, split: str = "train") -> Any:
            self.emit("noted", value=self.epochs)
            return super().train_epoch(split)

    runner = Emits(config(tmp_path))
    runner.train()
    assert [event["value"] for event in events(runner, "noted")] == [0, 1]


def test_close_may_be_called_again(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.train()
    runner.close()
    runner.close()


# loops and state of one's own -------------------------------------------------------------------------------
class OneEpochAtATime(SmallRunner):
    """Leaves its loop after each epoch."""

    def train(self, train_splits: Any = None, evaluate_splits: Any = None) -> Any:
        with self.at_work(train_splits, evaluate_splits) as epochs:
            if not epochs.are_over:
                with epochs.next() as epoch:
                    for split in epoch.left_to_train():
                        with self.training(split) as loop:
                            for window in loop:
                                for batch, step in window:
                                    with self.in_step(step):
                                        self.train_step(batch)
                        epoch.result[split] = self.get_epoch_result()
                    for split in epoch.left_to_evaluate():
                        epoch.result[split] = self.evaluate_epoch(split)
                self.save_result()
                self.save_checkpoint(epochs=epoch.completed)
        return self.results


def test_a_loop_of_ones_own_that_ends_early_leaves_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    whole = SmallRunner(config(tmp_path / "whole", epoch_end=3)).train()
    for epochs, status in ((1, "interrupted"), (2, "interrupted"), (3, "complete")):
        runner = OneEpochAtATime(config(tmp_path, epoch_end=3))
        results = runner.train()
        found = json.loads(Path(runner.dir, "status.json").read_text())
        assert (runner.epochs, found["status"]) == (epochs, status)
    assert results == whole


class Queue:
    """State of a user's own."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = list(state["seen"])


class Queued(SmallRunner):
    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.queue = Queue()
        self.training_state.register("queue", self.queue)

    def train_epoch(self, split: str = "train") -> dict[str, Any]:
        if self.epochs == 1 and not self.resumed:
            raise KeyboardInterrupt
        self.queue.seen.append(self.epochs)
        return super().train_epoch(split)


def test_a_part_that_was_registered_is_saved_and_restored(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Queued(config(tmp_path)).train()
    again = Queued(config(tmp_path))
    again.run(["train"])
    assert again.queue.seen == [0, 1]
    best = json.loads(Path(again.dir, "best.json").read_text())["index"]
    later = Queued(config(tmp_path))
    later.run(["evaluate"])
    assert later.queue.seen == list(range(best + 1)), "that of the best checkpoint"
    with pytest.raises(CheckpointError, match="register it in the runner's __init__"):
        again.training_state.register("late", again.queue)


def test_a_part_that_was_registered_outlives_another_config(tmp_path: Path) -> None:
    stopped = Queued(config(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    again = Queued(config(tmp_path))
    again.load_config(stopped.dir)
    again.train()
    assert again.queue.seen == [0, 1]
