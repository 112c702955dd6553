"""Callbacks: called at their moments, made from the config, saved and restored, and blamed by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import danling_core as dl
from danling_core.identity.ids import identify
from danling_core.launch.prepare import prepare
from tests.small_runner import SmallRunner, config, weights

Told = list[tuple[Any, ...]]


class Recorder(dl.Callback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: Told = []

    def on_fit_start(self, runner: Any) -> None:
        self.told.append(("fit starts", runner.steps))

    def on_fit_end(self, runner: Any) -> None:
        self.told.append(("fit ends", runner.steps))

    def on_epoch_start(self, runner: Any) -> None:
        self.told.append(("epoch starts", runner.epochs))

    def on_epoch_end(self, runner: Any, result: Any) -> None:
        assert result == runner.results[runner.epochs]
        self.told.append(("epoch ends", runner.epochs, sorted(result)))

    def on_step_end(self, runner: Any) -> None:
        self.told.append(("step", runner.steps, runner.iters))

    def on_evaluate_start(self, runner: Any, split: str) -> None:
        assert not runner.model.training and runner.mode == "evaluate"
        self.told.append(("evaluation starts", split))

    def on_evaluate_end(self, runner: Any, split: str, result: Any) -> None:
        self.told.append(("evaluation ends", split, sorted(result)))

    def on_save(self, runner: Any, names: Any) -> None:
        self.told.append(("save", tuple(names)))

    def on_exception(self, runner: Any, error: BaseException) -> None:
        self.told.append(("exception", type(error).__name__))


class Counter(dl.Callback):
    """Counts steps, over resumes, and lowers the learning rate by what it has counted."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.steps = 0
        self.stop_at = stop_at

    def on_step_end(self, runner: Any) -> None:
        self.steps += 1
        for group in runner.optimizer.param_groups:
            group["lr"] = 0.1 / self.steps
        if self.steps == self.stop_at:
            raise KeyboardInterrupt

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class Ends(dl.Callback):
    def __init__(self, after: int = 0) -> None:
        self.after = after

    def on_epoch_end(self, runner: Any, result: Any) -> None:
        if runner.epochs == self.after:
            runner.end_training("enough")


def test_moments_come_in_their_order(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, epoch_end=1, accum_steps=2))
    recorder = Recorder()
    runner.callbacks = [recorder]
    runner.train()
    assert recorder.told == [
        ("fit starts", 0),
        ("epoch starts", 0),
        ("step", 1, 2),
        ("step", 2, 4),
        ("evaluation starts", "val"),
        ("evaluation ends", "val", ["accuracy", "loss"]),
        ("epoch ends", 0, ["train", "val"]),
        ("save", ("latest", "best")),
        ("fit ends", 2),
    ]
    recorder.told.clear()
    runner.train()
    assert recorder.told == [], "nothing was left to do"
    runner.evaluate("val")
    assert [told[0] for told in recorder.told] == ["evaluation starts", "evaluation ends"]


def test_step_mode_has_segments(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, step_end=5, evaluate_interval_steps=2))

    class Segments(Recorder):
        def on_epoch_end(self, runner: Any, result: Any) -> None:
            assert result == runner.results[runner.steps]
            self.told.append(("ends", runner.steps))

    recorder = Segments()
    runner.callbacks.append(recorder)
    runner.train()
    assert [told for told in recorder.told if told[0] == "ends"] == [("ends", 2), ("ends", 4), ("ends", 5)]


def test_a_callback_that_has_a_state_goes_on_where_it_was(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"save_interval_steps": 1, "epoch_end": 3}

    def runner(root: Path, stop_at: int | None = None) -> SmallRunner:
        made = SmallRunner(config(root, **fields))
        made.callbacks = [Ends(after=7), Counter(stop_at), Counter()]
        return made

    undisturbed = runner(tmp_path / "undisturbed")
    undisturbed.train()
    with pytest.raises(KeyboardInterrupt):
        runner(tmp_path / "resumed", stop_at=6).train()
    resumed = runner(tmp_path / "resumed")
    resumed.train()
    assert resumed.resumed is not None and 0 < resumed.resumed["step"] < 12
    assert [callback.steps for callback in resumed.callbacks[1:]] == [12, 12]
    assert weights(resumed) == weights(undisturbed)
    assert resumed.results == undisturbed.results and resumed.bitwise


def test_training_ends_where_a_callback_says_so(tmp_path: Path) -> None:
    runner = SmallRunner(config(tmp_path, epoch_end=9))
    runner.callbacks = [Ends(after=2)]
    runner.train()
    assert len(runner.results) == 3
    again = SmallRunner(config(tmp_path, epoch_end=9))
    again.train()
    assert len(again.results) == 3, "it is complete, also for one that has no such callback"


def test_what_a_callback_raises_says_which_and_when(tmp_path: Path) -> None:
    class Broken(Recorder):
        def on_epoch_end(self, runner: Any, result: Any) -> None:
            raise KeyError("val_loss")

    runner = SmallRunner(config(tmp_path))
    broken = Broken()
    runner.callbacks = [Recorder(), broken]
    where = r"callback .*Broken.on_epoch_end \(epoch 0, step 4\): KeyError: 'val_loss'"
    with pytest.raises(dl.CallbackError, match=where) as raised:
        runner.train()
    assert isinstance(raised.value.__cause__, KeyError)
    assert broken.told[-1] == ("exception", "CallbackError")


def test_errors_of_on_exception_hide_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Worse(dl.Callback):
        def on_step_end(self, runner: Any) -> None:
            raise dl.RunInterrupted("a stop of its own")

        def on_exception(self, runner: Any, error: BaseException) -> None:
            raise ValueError("worse")

    runner = SmallRunner(config(tmp_path))
    runner.callbacks = [Worse()]
    with pytest.raises(dl.RunInterrupted, match="a stop of its own"):
        runner.train()
    assert "Worse failed in on_exception" in capsys.readouterr().err


class Misspelt(dl.Callback):
    def on_epoch_ends(self, runner: Any) -> None: ...


class Half(dl.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([Misspelt()], "nobody calls Misspelt.on_epoch_ends: did you mean on_epoch_end?"),
        ([object()], "object has none of the moments of a danling_core.Callback: on_fit_start"),
        ([Recorder], r"has the class Recorder: give it an instance, Recorder\(\)"),
        ([Half()], "Half has only one of state_dict and load_state_dict"),
    ],
)
def test_what_is_no_callback_is_refused_before_anything_starts(
    callbacks: list[Any], message: str, tmp_path: Path
) -> None:
    runner = SmallRunner(config(tmp_path))
    runner.callbacks = callbacks
    with pytest.raises(dl.ConfigError, match=message):
        runner.train()
    assert not list(tmp_path.iterdir())
    with pytest.raises(dl.ConfigError, match="self.callbacks is a str"):
        runner.callbacks = "Recorder"


# of the config ----------------------------------------------------------------------------------------------
HERE = "tests.unit.test_callbacks"


def test_callbacks_of_the_config_come_first(tmp_path: Path) -> None:
    wanted = config(
        tmp_path, callbacks=[f"{HERE}:Recorder", {"name": f"{HERE}:Counter", "stop_at": 3}, f"{HERE}:Ends"]
    )
    runner = SmallRunner(wanted)
    runner.callbacks = [Recorder()]
    made = list(runner._parts.callbacks)
    assert [type(each).__name__ for each in made] == ["Recorder", "Counter", "Ends", "Recorder"]
    assert made[1].stop_at == 3
    assert dl.Config.from_yamls(wanted.yamls()) == wanted and dl.Config.from_jsons(wanted.jsons()) == wanted
    assert wanted.override([f"callbacks=[{HERE}:Ends]"]).callbacks[0].name == f"{HERE}:Ends"


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        ("tests.unit.test_callbacks:Recorde", "callbacks.0 is .*has no class 'Recorde'; it has .*'Recorder'"),
        ("tests.no_such:Recorder", "callbacks.0 is .*there is no module 'tests.no_such'"),
        ("no_file.py:Recorder", "callbacks.0 names the file 'no_file.py', and there is none"),
        ("Recorder", "callbacks.0.name: wanted 'package.module:Class'"),
        (3, "callbacks.0"),
        ({"until": 3}, "callbacks.0.name"),
        ({"name": f"{HERE}:Counter", "stop": 3}, "Counter does not take what the config gives it: .*'stop'"),
        (f"{HERE}:Misspelt", "callbacks.0: nobody calls Misspelt.on_epoch_ends"),
        ("tests.small_runner:SmallRunner", "callbacks.0: SmallRunner has none of the moments"),
    ],
)
def test_a_callback_that_cannot_be_is_refused_when_the_run_is_prepared(
    callback: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(dl.ConfigError, match=message):
        wanted = config(tmp_path, callbacks=[callback], runner="tests.small_runner:SmallRunner")
        prepare(wanted.dict(), str(tmp_path))


def test_a_callback_is_part_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments and its code change the id, the place of its file does not."""
    text = "import danling_core as dl\nclass Mine(dl.Callback):\n    def __init__(self, at=1): ...\n"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run_id(file: str, text: str, **arguments: Any) -> str:
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text(text)
        wanted = config("runs", callbacks=[{"name": f"{file}:Mine", **arguments}])
        return identify(wanted, None).run_id

    first = run_id("mine.py", text)
    assert run_id("other/mine.py", text) == first
    assert run_id("mine.py", text + "# changed") != first
    assert run_id("mine.py", text, at=2) != first
    assert identify(config("runs"), None).run_id == identify(config("elsewhere"), None).run_id != first


def test_outside_git_the_code_of_a_callback_is_in_the_experiment_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runner.py").write_text("import danling_core as dl\nclass Mine(dl.TorchRunner): ...\n")
    Path("hooks.py").write_text("import danling_core as dl\nclass Hook(dl.Callback): ...\n")
    wanted = config("runs", callbacks=["hooks.py:Hook"]).replace(experiment_id=None)

    def experiment_id(wanted: dl.Config) -> str:
        return identify(wanted, "runner.py").experiment_id

    alone, first = experiment_id(wanted.replace(callbacks=[])), experiment_id(wanted)
    assert first != alone
    Path("hooks.py").write_text("import danling_core as dl\nclass Hook(dl.Callback): 1\n")
    assert experiment_id(wanted) not in (first, alone)
    assert experiment_id(wanted.replace(callbacks=[])) == alone
