"""The part of a runner that needs no torch: the skeleton of training, results, the run's folder, config files."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Self, TypeVar, get_args

from danling_core import storage
from danling_core.config import Config
from danling_core.config.overrides import apply
from danling_core.errors import ConfigError, NotFound
from danling_core.identity.ids import new_timestamp
from danling_core.results import formatting
from danling_core.results.values import flatten
from danling_core.runner.base import RunnerBase, RunnerMode
from danling_core.runner.loading import config_of
from danling_core.runner.objects import File, load_object, location, save_object
from danling_core.runner.parts import Parts, still_to_do
from danling_core.runner.resolve import import_runner, resolve
from danling_core.runs.folder import Status
from danling_core.session.script import ended_by_stops
from danling_core.train.epoch import Epoch, Epochs

Values = dict[str, Any]
History = dict[int, dict[str, dict[str, Any]]]
Splits = Sequence[str] | str
R = TypeVar("R")
Action = Literal["warn", "raise", "ignore"]
_ENDS = ("epoch_end", "step_end", "iter_end")


class BaseRunner(RunnerBase):
    """Identity, config, progress, results and the train/evaluate skeleton, without a framework.

    *Collective*: every rank calls it. Files are written by rank 0; other ranks return.

    Args:
        config: a `Config`, a mapping, or the path of a YAML or JSON file.

    Raises:
        ConfigError: the config or its params are refused.
    """

    _parts: Parts

    def __init__(self, config: Config | Mapping[str, Any] | str | os.PathLike[str]) -> None:
        self.logger = logging.getLogger("danling")
        self._take_config(config)
        self.mode = RunnerMode.train
        self.split = None
        self.model = self.ema = self.criterion = self.optimizer = self.scheduler = None
        self.scheduler_interval = None
        self.metrics = self.train_metrics = self.evaluate_metrics = self.meters = None
        self.init_distributed()
        self._parts.place.created_at = self._parts.ranks.broadcast(new_timestamp())
        self.set_seed()
        if self.config.deterministic:
            self.set_deterministic()

    def _take_config(self, config: Any) -> None:
        stated = config if isinstance(config, Config) else Config.load(config)
        self.config, self.params = resolve(type(self), stated)
        self._parts = self._make_parts(stated.model_dump(mode="json", exclude_unset=True))

    # brought by a framework ---------------------------------------------------------------------------------
    def _make_parts(self, stated: Values) -> Parts:
        """Make the parts for `self.config`; `stated` is what the user's config states of it."""
        raise NotImplementedError(f"{type(self).__name__} is no runner of a framework: subclass TorchRunner")

    def _set_up(self, train_splits: Sequence[str] | None, evaluate_splits: Sequence[str] = ()) -> None:
        """Place, wrap and resume what is not set up yet, for these splits; None trains nothing. Collective."""
        raise NotImplementedError

    def _end_epoch(self, epoch: Epoch) -> None:
        """Report the result of an epoch, count it, and let schedulers step on it. Collective."""
        raise NotImplementedError

    def _save_interrupted(self) -> None:
        """Save where the run stands inside an epoch, and wait until that is committed. Collective."""
        raise NotImplementedError

    def _load_best(self) -> tuple[str | None, int | None]:
        """Load the weights of the best checkpoint on every rank. Collective.

        Returns:
            its name, and the index of its result; None for the index where the best is damaged, and another one was
            loaded.
        """
        raise NotImplementedError

    def init_distributed(self) -> None:
        """Join the process group where there are several ranks. Collective; a second call changes nothing."""
        raise NotImplementedError

    def set_seed(self, seed: int | None = None, bias: int | bool | None = None) -> int:
        raise NotImplementedError

    def set_deterministic(self) -> None:
        raise NotImplementedError

    def train_epoch(self, split: str = "train") -> Values:
        raise NotImplementedError

    def evaluate_epoch(self, split: str = "val") -> Values:
        raise NotImplementedError

    def save_checkpoint(
        self, name: str = "latest", epochs: int | None = None, save_best: bool = True
    ) -> None:
        raise NotImplementedError

    def load_pretrained(self, checkpoint: File | Mapping[str, Any], strict: bool = True) -> Any:
        raise NotImplementedError

    def get_step_result(self) -> Values:
        raise NotImplementedError

    # train and evaluate -------------------------------------------------------------------------------------
    def train(self, train_splits: Splits | None = None, evaluate_splits: Splits | None = None) -> History:
        """Train to the end, or until patience runs out, resuming what is there; return `results`. Collective.

        Args:
            train_splits: default: those named `train...`.
            evaluate_splits: evaluated after each epoch; default: the others, without `test...` and `infer...`.

        Raises:
            RunInterrupted: asked to stop; everything is saved, and the next call resumes.
        """
        with self.at_work(train_splits, evaluate_splits) as epochs:
            while not epochs.are_over:
                # its events, and its report at the end; a stop in its middle saves it
                with epochs.next() as epoch:
                    for split in epoch.left_to_train():
                        epoch.result[split] = self.train_epoch(split)
                    for split in epoch.left_to_evaluate():
                        epoch.result[split] = self.evaluate_epoch(split)
                self.save_result()
                self.save_checkpoint(epochs=epoch.completed)
        return self.results

    @contextlib.contextmanager
    def at_work(
        self, train_splits: Splits | None = None, evaluate_splits: Splits | None = None
    ) -> Iterator[Epochs]:
        """Hold the run open, set up and resumed, and yield its epochs; without a worker, end it. Collective.

        Splits as for `train`, whose loop stands inside; so may one of your own.
        """
        _check_made(self)
        parts = self._parts
        to_train = parts.splits.to_train(train_splits)
        to_evaluate = parts.splits.to_evaluate(evaluate_splits, to_train)
        parts.splits.check(to_train, to_evaluate)
        parts.callbacks.check()
        is_script = parts.session.owns_run
        signals = ended_by_stops(lambda: parts.stop) if is_script else contextlib.nullcontext()
        with signals, self._parts.session.opened():
            is_complete = parts.session.is_complete()
            if not is_complete:
                parts.history.resolve_split(list(dict.fromkeys([*to_train, *to_evaluate])))
            self._set_up(to_train, to_evaluate)
            epochs = Epochs(
                self.config,
                parts.progress,
                parts.history,
                parts.epoch,
                train_splits=to_train,
                evaluate_splits=to_evaluate,
                is_complete=is_complete,
                emit=self.emit,
                on_begin=lambda: parts.callbacks.call("on_epoch_start", self),
                before_evaluation=parts.generators.hold,
                after_evaluation=parts.generators.release,
                on_interrupt=self._save_interrupted,
                on_end=self._end_epoch,
            )
            with contextlib.nullcontext() if epochs.are_over else parts.callbacks.fitting(self):
                yield epochs
            if not is_complete:
                parts.session.files.drain()
                if parts.session.owns_run:
                    self.finish(still_to_do=None if epochs.are_over else "training is not over")

    def end_training(self, reason: str) -> None:
        """Have training end with the epoch (in step mode, the segment) under way, as if that were the last.

        The run becomes complete, and a resume does not go on. Every rank calls it, as in a callback; rank 0's word
        counts. To save and go on later, see `request_stop`.
        """
        self._parts.epoch.ended = reason

    def evaluate(self, evaluate_splits: Splits | None = None) -> Values:
        """Evaluate splits, without touching `results`; return `{split: result}`. Collective.

        A runner that has neither trained nor loaded weights takes up its run's newest checkpoint first.
        """
        splits = self._parts.splits.to_evaluate(evaluate_splits)
        with self._parts.session.opened():
            self._set_up(None, splits)
            result: Values = self._parts.ranks.broadcast({s: self.evaluate_epoch(s) for s in splits})
            return result

    def run(self, stages: Sequence[str] | None = None) -> Status | None:
        """Run all stages, then write the completion record: what a worker calls. Collective.

        Args:
            stages: of "train" and "evaluate"; default: the config's. The run is complete once training is over
                and evaluated; until then its status stays as it was, or `interrupted`, and it can be resumed.

        Returns:
            the `Status` on rank 0, None elsewhere.

        Raises:
            RunInterrupted: asked to stop; saved, and the next run resumes.
        """
        _check_made(self)
        session = self._parts.session
        stages = self.config.stages if stages is None else stages
        self._parts.splits.check_names()
        if "train" in stages:
            self._parts.splits.check(self._parts.splits.to_train(), self._parts.splits.to_evaluate())
        owned, session.owns_run = session.owns_run, False
        try:
            with self._parts.session.opened():
                if session.is_complete():
                    return session.tell_complete()
                if "train" in stages:
                    if "evaluate" in stages:
                        self._parts.setup.to_evaluate_at_end = self._evaluated_at_end()
                    self.train()
                evaluation = self._evaluate_best() if "evaluate" in stages else None
                return self.finish(evaluation, still_to_do(self._parts, stages))
        finally:
            session.owns_run = owned

    def _evaluate_best(self) -> Values:
        """Evaluate the best checkpoint on the test splits, or on the score split where there are none. Collective."""
        parts, began = self._parts, time.monotonic()
        self._set_up(None)
        splits = self._evaluated_at_end()
        loaded, index = self._load_best()
        self.emit("evaluate_began", splits=splits, checkpoint=loaded)
        result: Values = parts.ranks.broadcast({split: self.evaluate_epoch(split) for split in splits})
        evaluation = {"checkpoint": loaded, "index": index, "result": result}
        parts.session.files.write_evaluation(evaluation, parts.place.identity_fields())
        self.emit("evaluate_finished", result=result, seconds=time.monotonic() - began)
        return result

    def _evaluated_at_end(self) -> list[str]:
        """Return the splits of the evaluate stage; before the first result, that of the score to come."""
        splits = self._parts.splits
        tests = [split for split in splits.names if split.startswith("test")]
        scored = [self.score_split] if self.score_split else [*splits.to_evaluate(), *splits.to_train()][:1]
        return list(self.config.evaluate_splits or tests or scored)

    def finish(self, evaluation: Values | None = None, still_to_do: str | None = None) -> Status | None:
        """Write the completion record, last of all. Collective; returns it on rank 0, None elsewhere.

        Args:
            evaluation: the result of the evaluate stage.
            still_to_do: why the run is not complete, though all that was asked for is done.
        """
        return self._parts.session.finish(evaluation, still_to_do)

    def close(self) -> None:
        """Close files and logs: the end of `train`, `evaluate`, `infer` and `run`. A second call does nothing."""
        self._parts.session.close()

    def request_stop(self, reason: str = "asked to stop") -> None:
        """Have all ranks save and stop before a step that is about to begin: `train` raises RunInterrupted there.

        Any rank, from any thread; does nothing before training has begun.
        """
        self._parts.stop.wish(reason)

    # logging ------------------------------------------------------------------------------------------------
    def init_logging(self) -> None:
        """Open the logger named `danling`, with the run's text log on rank 0; the root logger is left alone."""
        self._parts.session.open_log()

    def init_print(self, process: int = 0) -> None:
        """Let only rank `process` speak through the logger; `print` itself is left alone."""
        self._parts.session.hear(process)

    def init_tensorboard(self) -> None:
        """Open the curves (and the progress bar), from where a resume stands. Rank 0; others return."""
        self._parts.session.check_open("init_tensorboard")
        self._parts.session.open_writers()

    def emit(self, kind: str, **fields: Any) -> None:
        """Append an event of this kind to the run's event log, and pass it on to every writer. Rank 0."""
        self._parts.session.check_open("emit")
        self._parts.session.files.emit(kind, **fields)

    # results ------------------------------------------------------------------------------------------------
    def append_result(self, result: Mapping[str, Any], index: int | None = None) -> None:
        """Report `{split: {metric: value}}`, merging into what `index` (default: the current epoch) already has."""
        self._parts.history.append(result, self.epochs if index is None else index)

    def save_result(self) -> None:
        """Replace results.json, latest.json, best.json and status.json. Rank 0; others return."""
        self._parts.session.check_open("save_result")
        self._parts.session.save_results()

    def print_result(self) -> None:
        """Log the latest and the best result, readably. Rank 0."""
        if self.is_main_process:
            with self._parts.session.heard():
                self.logger.info("%s", self.format_result())

    def step_log(self, split: str, iteration: int, length: int | None = None) -> Values:
        """Log the step's result and, in training, write it as curves `{split}_steps/{metric}`; return it.

        For a loop of your own. The curves `{split}/{metric}` are those of whole epochs.
        """
        result = self.get_step_result()
        if length is None:
            length = self._parts.splits.length_of(split)
        self.logger.info("%s", self.format_step_result(result, split, iteration, length))
        if self.mode is RunnerMode.train:
            self.write_result(result, f"{split}_steps")
        return result

    def format_step_result(
        self,
        result: Mapping[str, Any],
        split: str = "train",
        steps: int | None = None,
        length: int | None = None,
    ) -> str:
        """Format a step's result as one line: `train 50/200 | loss 0.1230`."""
        return formatting.format_step_result(result, split, steps, length)

    def format_epoch_result(
        self, result: Mapping[str, Any], epochs: int | None = None, total: int | None = None
    ) -> str:
        """Format an epoch's result as one line: `epoch 3/30 | train loss 0.1230 | val loss 0.2000`.

        Args:
            epochs: the epoch; default: the result's `index`, else the current one.
            total: how many there are; default: `epoch_end`, where that is stated.
        """
        number = result.get("index", self.epochs) if epochs is None else epochs
        return formatting.format_epoch_result(
            result, number, self.config.epoch_end if total is None else total
        )

    def format_result(self, result: Mapping[str, Any] | None = None) -> str:
        """Format a result as a small table, a row for each split; by default the latest and the best."""
        return formatting.format_result(self._parts.history if result is None else result)

    def write_result(self, result: Mapping[str, Any], split: str, steps: int | None = None) -> None:
        """Write a result to TensorBoard and `loggers`, a curve `{split}/{metric}` for each value.

        Lists and maps expand to several curves.

        Args:
            steps: the position on the curve; default: the completed steps.
        """
        for name, value in flatten(result).items():
            self.write_score(name, value, split, steps)

    def write_score(self, name: str, score: float, split: str, steps: int | None = None) -> None:
        """Write one point of the curve `{split}/{name}` to TensorBoard and `loggers`, where there are any. Rank 0."""
        session = self._parts.session
        for writer in (session.writer_of(split), *session.services):
            if writer is not None:
                writer.add_scalar(f"{split}/{name}", float(score), self.steps if steps is None else steps)

    # files --------------------------------------------------------------------------------------------------
    def save(self, obj: Any, file: File, main_process_only: bool = True) -> File:
        """Write an object, by the file's suffix: .pt .pth .bin .ckpt .safetensors .npy .csv .json .yaml.

        The first four hold tensors and plain values, .safetensors tensors by name, .npy one array, .csv rows or
        columns. A pickle is refused.

        Args:
            file: a path, or any URL.
            main_process_only: whether ranks other than 0 only return.

        Returns:
            the file.
        """
        if self.is_main_process or not main_process_only:
            save_object(obj, file)
        return file

    @staticmethod
    def load(file: File) -> Any:
        """Read what `save` wrote, local or at any URL; code in it is never run."""
        return load_object(file)

    def check_dir(self, action: Action = "warn") -> bool:
        """Return whether the run's folder is empty or absent; if not, warn, raise `ConfigError` or ignore it."""
        if action not in get_args(Action):
            raise ConfigError(f"check_dir: action is {action!r}, wanted one of {', '.join(get_args(Action))}")
        with contextlib.suppress(NotFound):
            names = storage.list_names(self.dir)
            if names:
                message = f"the run's folder {self.dir} is not empty: it has {', '.join(sorted(names)[:5])}"
                if action == "raise":
                    raise ConfigError(f"{message}; begin anew with --fresh, or give another dir")
                if action == "warn":
                    warnings.warn(message, stacklevel=2)
                return False
        return True

    # config -------------------------------------------------------------------------------------------------
    def json(self, file: File) -> None:
        """Write the config as JSON to a file or URL. Rank 0; others return."""
        if self.is_main_process:
            self.config.json(location(file))

    def jsons(self) -> str:
        """Return the config as JSON text."""
        return self.config.jsons()

    def yaml(self, file: File) -> None:
        """Write the config as YAML to a file or URL. Rank 0; others return."""
        if self.is_main_process:
            self.config.yaml(location(file))

    def yamls(self) -> str:
        """Return the config as YAML text."""
        return self.config.yamls()

    @classmethod
    def from_json(cls, file: File) -> Self:
        """Make a runner with the config in a JSON file."""
        return _runner_of(cls, Config.from_json(location(file)))

    @classmethod
    def from_jsons(cls, text: str) -> Self:
        """Make a runner with the config in JSON text."""
        return _runner_of(cls, Config.from_jsons(text))

    @classmethod
    def from_yaml(cls, file: File) -> Self:
        """Make a runner with the config in a YAML file."""
        return _runner_of(cls, Config.from_yaml(location(file)))

    @classmethod
    def from_yamls(cls, text: str) -> Self:
        """Make a runner with the config in YAML text."""
        return _runner_of(cls, Config.from_yamls(text))

    @classmethod
    def from_checkpoint(cls, checkpoint: File | Mapping[str, Any]) -> Self:
        """Make a runner with the config and the weights of a run: its folder or a checkpoint in it, at any URL; or a
        state, which says what its config was.

        Called on `Runner` itself, it makes the class that the config names.
        """
        runner = _runner_of(cls, config_of(checkpoint))
        runner.load_pretrained(checkpoint)
        return runner

    def load_config(self, checkpoint: File | Mapping[str, Any], overwrite: bool = False) -> None:
        """Replace the runner's config by that of a run's folder, or of a checkpoint in it; before training begins.

        A mapping is a state, or a config.

        Args:
            overwrite: also replace what this runner's own config states; else that wins.
        """
        before = self._parts
        if before.session.is_open or self.iters:
            raise ConfigError("load_config comes before training: this runner has begun already")
        loaded = config_of(checkpoint)
        if not overwrite:
            ends = dict.fromkeys(_ENDS) if any(name in before.stated for name in _ENDS) else {}
            loaded = Config.from_dict(apply({**loaded.dict(), **ends}, before.stated))
        self._take_config(loaded)
        self._parts.adopt(before)
        self.set_seed()

    def dict(self) -> Values:
        """Return the whole config as plain values."""
        return self.config.dict()


def _check_made(runner: object) -> None:
    if "_parts" not in vars(runner):
        raise ConfigError(f"{type(runner).__name__}.__init__ does not call super().__init__(config)")


def _runner_of(cls: type[R], config: Config) -> R:
    """Make a runner of a user's class; of the class that the config names, where this one is ours."""
    made: Any = cls
    if cls.__module__.startswith("danling_core.") and config.runner is not None:
        made = import_runner(config.runner)
    runner: R = made(config)
    return runner
