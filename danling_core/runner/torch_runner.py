"""The PyTorch runner: the steps of training, evaluation and inference. Users subclass it."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from danling_core.data.batches import to_device
from danling_core.errors import ConfigError, DanLingError, NonFiniteLossError
from danling_core.metrics.states import NoMetrics
from danling_core.optim.schedulers import needs_metric
from danling_core.parallel import seeding
from danling_core.parallel.control import collective_timeout
from danling_core.parallel.environment import environment
from danling_core.parallel.stopping import NeverStopping
from danling_core.parallel.strategies import unwrap
from danling_core.runner import keywords, loading, set_up, trainable
from danling_core.runner.base import RunnerMode, also_a_switch
from danling_core.runner.base_runner import BaseRunner, Values
from danling_core.runner.beginning import begin
from danling_core.runner.data_trial import try_data
from danling_core.runner.loading import LoadedKeys
from danling_core.runner.look import look
from danling_core.runner.objects import File
from danling_core.runner.parts import Parts, make_parts
from danling_core.runner.resolve import check_named
from danling_core.runner.training_state import begin_split, register_parts
from danling_core.session import restore
from danling_core.session.files import RunFiles
from danling_core.train.epoch import Epoch
from danling_core.train.evaluator import computed
from danling_core.train.finite import weights_check
from danling_core.train.logged import Reduction
from danling_core.train.loop import TrainLoop
from danling_core.train.meters import SplitMeter
from danling_core.train.state import Order
from danling_core.train.step import ALONE, REHEARSAL, Step
from danling_core.train.stepper import Stepper


class TorchRunner(BaseRunner):
    """Trains a torch model on one rank or many, CPU or CUDA.

    A subclass calls `super().__init__(config)` and sets `datasets`, `model`, `criterion`, and, unless the
    config names them, `optimizer` and `scheduler`. Moving to the device, DDP, EMA and resume happen when
    `train()` begins.
    """

    # train --------------------------------------------------------------------------------------------------
    def train_epoch(self, split: str = "train") -> Values:
        """Train until the epoch, or in step mode the segment, ends; return the split's result. Collective."""
        with self.training(split) as loop:
            for window in loop:
                for batch, step in window:
                    with self.in_step(step):
                        self.train_step(batch)
        return self.get_epoch_result()

    def train_step(self, data: Any) -> tuple[Any, Any]:
        """Make one iter: forward, loss, metrics, `advance`. Override it for other data, or several losses.

        Args:
            data: one batch on the device: `(input, target)`, a mapping with `input` and `target`, or a mapping of
                keywords of the model's call, whose output has `logits` and, without a criterion, `loss`.

        Returns:
            the prediction, and the mean loss over the batch (a scalar).
        """
        if type(data) is not tuple and type(data) is not list and keywords.are_keywords(data):
            with self.autocast():
                pred, target, loss = keywords.forward(self.model, self.criterion, data)
            if loss is None:
                raise ConfigError(
                    "the model returned no `loss`: give it `labels` in the batch, set self.criterion, or override "
                    "train_step"
                )
            if target is not None:
                self.update_metrics(pred, target)
            self.advance(loss)
            return pred, loss
        inputs, target = _input_and_target(data)
        if self.criterion is None:
            raise ConfigError("self.criterion is not set: set it in __init__, or override train_step")
        with self.autocast():
            pred = self.model(inputs)
            loss = self.criterion(pred, target)
        self.update_metrics(pred, target)
        self.advance(loss)
        return pred, loss

    def advance(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Compute gradients and, at the end of an accumulation window, step the optimizer.

        Call it once per `train_step` for each optimizer. With several of them, each has its own gradient scaler,
        clipping and window, and a loss changes the gradients of its own optimizer's parameters only.

        Args:
            loss: mean over this rank's batch, a scalar. It is weighted here, so that the window's gradient is that of
                the mean over all its samples on all ranks.
            optimizer: one in an attribute of the runner; default: `self.optimizer`, else the first attribute that is
                one. Its loss is the `loss` of results; that of another is called `loss_{attribute}`.
        """
        parts = self._parts
        step, first = parts.step.value, parts.steppers.first or self._first_stepper()
        stepper = first if optimizer is None else parts.steppers.of(optimizer)
        if not isinstance(loss, torch.Tensor):
            raise ConfigError(
                f"advance was given a {type(loss).__name__}, wanted the loss: a tensor of one number"
            )
        if not step.is_rehearsal:
            meter = self.meters if stepper is first else parts.losses[stepper.name]
            meter.add(loss, step.count)
        stepper.advance(loss, step)
        if stepper is first and step.ends_window and not step.is_rehearsal:
            parts.progress.count_step()
            if step is ALONE:
                parts.progress.count_iter()
                parts.progress.end_window()

    def _first_stepper(self) -> Stepper:
        """Set up training where `advance` is called before any of it, as in a notebook."""
        if self.distributed:
            raise ConfigError(
                "advance comes after the model is wrapped for several ranks: call train or train_epoch, or put your "
                "loop into `with self.at_work():`"
            )
        parts = self._parts
        self._set_up(parts.splits.to_train(), resume=False)
        self.meters = trainable.begin_meters(parts, self._explain)
        first = parts.steppers.first
        assert first is not None
        return first

    def backward(self, loss: torch.Tensor) -> None:
        """Compute the gradients of a loss, which is weighted, and scaled where fp16 needs it. `advance` calls it."""
        loss.backward()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of the forward pass, after `precision`."""
        return self._parts.precision.autocast()

    def update_metrics(self, pred: Any, target: Any) -> None:
        """Count a batch in `metrics`, or in `train_metrics` or `evaluate_metrics` where these are set."""
        metrics = self._metrics_in_use()
        if metrics is not None:
            metrics.update(pred, target)

    @also_a_switch
    def log(
        self,
        name: str,
        value: torch.Tensor | float,
        *,
        reduction: Reduction = "mean",
        weight: torch.Tensor | float | None = None,
    ) -> None:
        """Report a value of the batch under way under `name`, beside the loss: in results, curves and as a score.

        Call it in `train_step` and `evaluate_step`. Not collective: ranks may log different names. Nothing waits for
        the device. In inference it does nothing. As a value, `self.log` says whether a text log is kept.

        Args:
            value: a number or a tensor. Of a tensor of several numbers, their mean (sum, min, max) is logged.
            reduction: over all batches of the split and all ranks: the weighted `mean`, `sum`, `min`, `max`, or
                `last`, which is the mean over the ranks of what each logged last.
            weight: of a mean; default: the samples in the batch. Give tokens or pixels where a loss is a mean of those.

        Raises:
            ConfigError: the value is no number, or the name is reduced in another way already.
        """
        if self.mode is RunnerMode.infer:
            return
        if self.meters is None:
            if self.current_step is REHEARSAL:
                return
            self._first_stepper()
        self.meters.log(name, value, reduction, weight)

    def _metrics_in_use(self) -> Any:
        own = self.train_metrics if self.mode is RunnerMode.train else self.evaluate_metrics
        return self.metrics if own is None else own

    @contextlib.contextmanager
    def training(self, split: str = "train") -> Iterator[TrainLoop]:
        """Begin a split, or go on in it, and yield its windows of `(batch, step)`. Collective.

        Raises:
            ConfigError: `advance` was never called.
        """
        parts, config = self._parts, self.config
        if not parts.setup.is_trainable:
            self._set_up((split,), resume=False)
        self.split, self.mode = split, RunnerMode.train
        trainable.check_unchanged(parts, self, split)
        if trainable.take_unfrozen(parts, self):
            self._rehearse(split)
        parts.modules.train()
        metrics = self._metrics_in_use()
        self.meters = trainable.begin_meters(parts, self._explain)
        if metrics is not None:
            metrics.reset()
        parts.epoch.split = split
        parts.report.begin()
        parts.callbacks.begin_epoch()
        parts.steppers.begin_epoch()
        begin_split(parts, self.meters, metrics)

        def log() -> None:
            self.meters.flush()
            parts.session.files.check_saves()
            parts.report.report(split, self.meters)

        with set_up.explaining_batch_norm(split, self.rank, lambda: parts.step.value.count):
            yield TrainLoop(
                parts.splits.stream(split),
                config,
                parts.progress,
                parts.epoch,
                device=self.device,
                timings=parts.timings,
                check_stop=parts.stop.check,
                beat=parts.session.heartbeat(),
                count_epoch=self._count_epoch,
                after_window=self._end_window,
                log=log,
                save=lambda: self.save_checkpoint(save_best=False) if parts.session.is_open else None,
            )
        meters = [self.meters, *parts.losses.values()]
        for meter in meters:
            meter.flush()
        parts.epoch.split = None
        if all(meter.iters == 0 for meter in meters):
            raise ConfigError(
                f"{type(self).__name__}.train_step never called self.advance(loss): nothing was trained"
            )
        if parts.epoch.is_whole and not parts.session.is_open:  # in a loop of the user's own
            self._count_epoch()

    def _end_window(self) -> None:
        """Check that the window made its step, and save where the step asked for it."""
        parts = self._parts
        parts.steppers.check_window()
        if not parts.setup.is_stepped:
            parts.setup.is_stepped = True
            if self.is_main_process:
                set_up.warn_of_unread(self.params)
        if parts.callbacks.at_step:
            parts.callbacks.step_ended(self)
        if parts.saves_due:
            due, parts.saves_due = parts.saves_due, []
            for save in due:
                save()

    def in_step(self, step: Step) -> contextlib.AbstractContextManager[None]:
        """Return the context of one `train_step`: what `advance` counts and weighs is `step`.

        Inside an accumulation window gradients are not reduced yet; a batch that only keeps this rank in step with
        the others is not counted in the metrics.
        """
        current = self._parts.step
        current.value = step
        return current if step.ends_window and step.count else self._aside(step)

    @contextlib.contextmanager
    def _aside(self, step: Step) -> Iterator[None]:
        """Return the context of the rarer kinds of step."""
        metrics, train_metrics = self.metrics, self.train_metrics
        if step.count == 0:
            self.metrics, self.train_metrics = NoMetrics(), NoMetrics()
        no_sync = contextlib.nullcontext() if step.ends_window else self._parts.modules.no_sync()
        try:
            with self._parts.step, no_sync:
                yield
        finally:
            self.metrics, self.train_metrics = metrics, train_metrics

    def _explain(self, message: str) -> NonFiniteLossError:
        """Return the error for a loss that is not finite, with its step and rank, and what to do.

        Where a save that is under way finds that the weights were not finite already, it is that one.
        """
        try:
            self._parts.session.files.drain()
        except NonFiniteLossError as earlier:
            return earlier
        except DanLingError as unsaved:
            self.logger.error("besides, a checkpoint was not saved: %s", unsaved)
        step = self._parts.epoch.steps_before + (self.meters.iters - 1) // self.accum_steps
        return NonFiniteLossError(
            f"{message} (step {step}, rank {self.rank}, split {self.split!r}): nothing was saved since; "
            "lower the learning rate, clip gradients, or set non_finite=skip"
        )

    def _count_epoch(self) -> None:
        """Count a pass over the data, and step a schedule that counts them."""
        self._parts.progress.count_epoch()
        scheduler = self.scheduler
        by_steps = any(scheduler in stepper.schedulers for stepper in self._parts.steppers)
        if scheduler is not None and not by_steps and not needs_metric(scheduler):
            scheduler.step()

    def _end_epoch(self, epoch: Epoch) -> None:
        parts = self._parts
        index = epoch.number if parts.progress.by_epoch else self.steps
        result, parts.epoch.ended = parts.ranks.broadcast((epoch.result, parts.epoch.ended))
        self.append_result(result, index)
        if parts.callbacks:
            parts.callbacks.call("on_epoch_end", self, result)
            parts.epoch.ended = parts.ranks.broadcast(parts.epoch.ended)
        if parts.epoch.ended is not None and self.is_main_process:
            self.logger.info("training ends here: %s", parts.epoch.ended)
        elif parts.history.should_stop(self.config.patience) and self.is_main_process:
            self.logger.info(
                "training ends here: no better %s for %d evaluations (patience)",
                *(parts.history.score_name, self.config.patience),
            )
        if parts.epoch.is_whole:
            self._count_epoch()
            epoch.completed = self.epochs - 1
        parts.progress.seconds += epoch.seconds
        score = self.scores.get(index) if needs_metric(self.scheduler) else None
        if score is not None:
            self.scheduler.step(score)
        self.emit(
            "epoch_finished",
            epoch=epoch.number,
            index=index,
            result=self.results[index],
            seconds=epoch.seconds,
            score=self.scores.get(index),
            is_best=self.is_best,
            timings=parts.timings.of_epoch(self.device, self.steps),
        )

    def scale_lr(
        self, lr: float, lr_scale_factor: float | None = None, batch_size_base: int | None = None
    ) -> float:
        """Return the learning rate after the linear scaling rule (arXiv 1706.02677); also in a runner's `__init__`.

        It is `lr` times `batch_size_equivalent` over `batch_size_base`, or times a stated factor.

        Raises:
            ConfigError: neither the factor nor the base is given, or both.
        """
        if (lr_scale_factor is None) == (batch_size_base is None):
            raise ConfigError("scale_lr needs exactly one of lr_scale_factor and batch_size_base")
        if lr_scale_factor is None:
            assert batch_size_base is not None
            lr_scale_factor = self.batch_size_equivalent / batch_size_base
        return lr * lr_scale_factor

    # evaluate -----------------------------------------------------------------------------------------------
    def evaluate_epoch(self, split: str = "val") -> Values:
        """Evaluate a split: each sample counts once at any world size, EMA weights where there are any. Collective."""
        return self.evaluate_steps(split)

    def evaluate_steps(self, split: str = "val", steps: int | None = None) -> Values:
        """Evaluate the first batches of a split, as `evaluate_epoch` does all of them. Collective.

        Args:
            steps: batches of each rank, at most; None: what `limit_batches` says, else all.
        """
        if steps is not None and steps < 1:
            raise ConfigError(f"evaluate_steps: steps is {steps}, wanted 1 or more")
        if not self._parts.setup.is_trainable:
            self._set_up(None, (split,), resume=False)
        evaluator, loader = self._parts.evaluator, self._parts.splits.evaluate_loader(split)
        before, self.meters = self.meters, SplitMeter()
        try:
            with self._evaluating(RunnerMode.evaluate, split):
                metrics = self._metrics_in_use()
                if metrics is not None:
                    metrics.reset()
                callbacks = self._parts.callbacks
                callbacks.call("on_evaluate_start", self, split)
                most = self._parts.splits.most(split)
                most = steps if most is None else most if steps is None else min(most, steps)
                evaluator.evaluate(loader, self.evaluate_step, self.meters, self.size_of, most=most)
                result = self.get_epoch_result()
                callbacks.call("on_evaluate_end", self, split, result)
                return result
        finally:
            self.meters = before

    def evaluate_step(self, data: Any) -> tuple[Any, Any]:
        """Evaluate one batch, without gradients: forward, loss, metrics.

        Returns:
            the prediction, and the mean loss or None; or a mapping with a `loss`.
        """
        if type(data) is not tuple and type(data) is not list and keywords.are_keywords(data):
            with self.autocast():
                pred, target, loss = keywords.forward(self.model, self.criterion, data)
            if target is not None:
                self.update_metrics(pred, target)
            return pred, loss
        inputs, target = _input_and_target(data)
        with self.autocast():
            pred = self.model(inputs)
            loss = self.criterion(pred, target) if self.criterion is not None else None
        self.update_metrics(pred, target)
        return pred, loss

    def infer(self, split: str = "infer") -> Any:
        """Return the model's outputs for a split, in data set order, on every rank, on the CPU. Collective."""
        parts = self._parts
        parts.splits.known(split)
        with parts.session.opened():
            outputs = list(self.predictions(split))
            return parts.evaluator.joined(outputs, parts.splits.evaluate_loader(split))

    def predictions(self, split: str = "infer") -> Iterator[Any]:
        """Yield the model's outputs for a split batch by batch, on the CPU: what `infer` joins, never all in memory.

        On several ranks each yields its own batches; of sized data these are contiguous parts, in rank order.
        """
        parts = self._parts
        parts.splits.known(split)
        with parts.session.opened():
            self._set_up(None, (split,))
            with self._evaluating(RunnerMode.infer, split):
                loader = parts.splits.evaluate_loader(split)
                # left early, it ends as well as one that is read to its end
                with contextlib.suppress(GeneratorExit):
                    yield from parts.evaluator.outputs(loader, self.infer_step, parts.splits.most(split))

    def infer_step(self, data: Any) -> Any:
        """Return the outputs for one batch: `(batch, ...)`."""
        if type(data) is not tuple and type(data) is not list and keywords.are_keywords(data):
            with self.autocast():
                return keywords.forward(self.model, None, keywords.inputs_of(data))[0]
        inputs = _input_and_target(data)[0] if isinstance(data, Mapping | Sequence) else data
        with self.autocast():
            return self.model(inputs)

    @contextlib.contextmanager
    def _evaluating(self, mode: RunnerMode, split: str) -> Iterator[None]:
        """Let `self.model` be the unwrapped (or averaged) module, in eval mode, without gradients; put back after."""
        before, split_before, began = self.mode, self.split, time.perf_counter()
        try:
            with self._parts.modules.evaluating(None if self.ema is None else self.ema.module):
                self.mode, self.split = mode, split
                yield
        finally:
            self.mode, self.split = before, split_before
            self._parts.timings.evaluate_seconds += time.perf_counter() - began

    def get_epoch_result(self) -> Values:
        """Return loss, logged values and metrics of the split being passed over, so far, over all ranks. Collective."""
        if self.meters is None:
            raise ConfigError("no split was passed over yet: train_epoch and evaluate_epoch count one")
        is_trained = self.mode is RunnerMode.train
        metrics, losses = self._metrics_in_use(), self._parts.losses if is_trained else {}
        result = self._parts.evaluator.reduce(self.meters, metrics, losses, must_count=not is_trained)
        if not result and not is_trained:
            raise ConfigError(
                f"split {self.split!r} reports nothing: let evaluate_step return (prediction, loss), set "
                "self.criterion, or give self.metrics"
            )
        return result or {"loss": math.nan}

    def get_step_result(self) -> Values:
        """Return the running loss, logged values and metrics of the split being passed over, of this rank. Waits for
        the device.

        With metrics of torchmetrics it is collective, since they reduce themselves.
        """
        if self.meters is None:
            raise ConfigError("no step was made yet: get_step_result is for the running split")
        return {
            "loss": self.meters.mean,
            **self.meters.logged.values(),
            **computed(self._metrics_in_use()),
        }

    # checkpoints --------------------------------------------------------------------------------------------
    def state_dict(self) -> Values:
        """Return everything a bitwise resume needs that is equal on all ranks; per-rank state is gathered beside it.

        A save calls it on rank 0 only: no collective may be in it. See `training_state` for a part of your own.

        Raises:
            ConfigError: a step is under way, whose batch is taken and not counted yet.
        """
        if self.current_step is not ALONE:
            raise ConfigError(
                "state_dict() inside a step would hold half of it: take it after the step, or call save_checkpoint(), "
                "which waits for its end"
            )
        return self._parts.state.shared_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; every resume calls it, on every rank, once all is set up. Collective.

        Called before training, it sets up what the state belongs to. A state that is given by hand is copied, and says
        nothing of random generators and of the sums of an epoch that has begun: the run is not bitwise equal then.

        Raises:
            CheckpointError: a newer version of danling wrote it.
        """
        setup = self._parts.setup
        if not setup.is_under_way:
            state = copy.deepcopy(state)
            if not setup.is_trainable:
                self._set_up(self._parts.splits.to_train() or None, resume=False)
            setup.not_bitwise("load_state_dict restores no random generators; load_checkpoint does")
        self._parts.state.load_shared(state)

    def save_checkpoint(
        self, name: str = "latest", epochs: int | None = None, save_best: bool = True
    ) -> None:
        """Save the run's whole state in the background; the loop pays for a copy of it. Collective.

        Inside a step it is saved once the step is over, in an accumulation window once that is.

        Args:
            name: the pointer to move; what it names is kept until it moves again.
            epochs: number of the epoch that just ended: kept as `epoch-N` every `save_interval` epochs.
            save_best: also move `best`, where the latest result is the best.

        Raises:
            CheckpointError: an earlier save failed for good.
        """
        if self.current_step is not ALONE:  # half a step is no state: its batch is taken, and not counted
            self._parts.saves_due.append(lambda: self.save_checkpoint(name, epochs, save_best))
            return
        self._parts.session.check_open("save_checkpoint")
        every, names = self.save_interval, [name]
        # inside an epoch the state is past the latest result
        if save_best and self.is_best and not self._parts.epoch.is_begun:
            names.append("best")
        if epochs is not None and every is not None and (epochs + 1) % every == 0:
            names.append(f"epoch-{epochs}")
        began = time.perf_counter()
        self._save(names, required=len(names) > 1 or self._parts.progress.finished)
        self._parts.timings.checkpoint_stall_seconds += time.perf_counter() - began

    def _save(self, names: list[str], *, required: bool) -> None:
        """Save under these names; a `required` save is never given up for a newer one. Collective."""
        parts = self._parts
        parts.callbacks.call("on_save", self, names)
        for meter in (self.meters, *parts.losses.values()):
            if meter is not None:
                meter.flush()
        parts.modules.check_equal(self.steps)
        ranks, files = parts.ranks.gather(parts.state.rank_state()), parts.session.files
        if not isinstance(files, RunFiles):
            return
        files.check_saves()
        files.save(
            {**self.state_dict(), "ranks": ranks},
            step=self.steps,
            info={
                "progress": {"iters": self.iters, "steps": self.steps, "epochs": self.epochs},
                "epochs": self.epochs,
                "score": self.latest_score,
                "best_index": self.best_index,
                "inside": parts.epoch.split,
                "world_size": self.world_size,
            },
            names=names,
            required=required,
            inspect=weights_check(parts.modules.own, self.steps)
            if self.config.non_finite == "raise"
            else None,
        )

    def _save_interrupted(self) -> None:
        self._save(["latest"], required=True)
        self._parts.session.files.drain()

    def load_checkpoint(self, checkpoint: File | Mapping[str, Any]) -> None:
        """Take over the whole state of a checkpoint. Collective.

        A checkpoint of the run's own wins when `train` begins.

        Args:
            checkpoint: a run's folder, a folder of checkpoints, a checkpoint in it by name
                (`run/checkpoints/epoch-3`), or a file, local or at any URL; or a state.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        state = loading.whole_state(checkpoint)
        self._set_up(self._parts.splits.to_train() or None, resume=False)
        self._apply(state)

    def load_pretrained(self, checkpoint: File | Mapping[str, Any], strict: bool = True) -> LoadedKeys:
        """Take over weights only, the averaged ones where the checkpoint has them; return the names left out.

        A checkpoint of a run also gives the weights of the criterion and of modules in other attributes.

        Args:
            checkpoint: as for `load_checkpoint`, or a plain state dict of weights.
            strict: refuse weights that do not fit in name and shape; else take over those that do.

        Raises:
            CheckpointError: with `strict`, weights are missing or unexpected (listed); or nothing fits at all.
        """
        state = loading.read(checkpoint, "best")
        weights = loading.weights_in(state)
        averaged = [] if self.ema is None else [self.ema.module]
        keys = loading.load_weights(weights, unwrap(self.model), averaged, strict)
        trainable.load_other_weights(self._parts, self, state)
        self._parts.setup.has_weights = True
        return keys

    def _apply(self, state: Mapping[str, Any]) -> None:
        """Take over a whole state, once all is set up. The generators come last."""
        parts, ranks = self._parts, state.get("ranks", [])
        with parts.setup.under_way():
            self.load_state_dict(state)
        if not ranks:
            parts.setup.not_bitwise("the state that it began with holds no random generators")
            return
        if len(ranks) != self.world_size:
            parts.setup.not_bitwise(f"the run was on {len(ranks)} rank(s) and goes on with {self.world_size}")
        parts.state.load_rank(ranks, self.rank, self.world_size)

    def _load_best(self) -> tuple[str | None, int | None]:
        parts = self._parts
        parts.session.files.drain()
        record = restore.best(parts.session.files, parts.ranks)
        if record is None:
            return None, None
        state = restore.read(record, parts.session.files, parts.place.local_checkpoint_dir)
        parts.state.load_shared(state, up_to=Order.weights)
        parts.state.load_rank(state["ranks"], self.rank, self.world_size, up_to=Order.weights)
        return record.name, record.info.get("best_index") if "best" in record.names else None

    # set-up -------------------------------------------------------------------------------------------------
    def init_distributed(self) -> None:
        """Join the process group where there are several ranks. Collective; a second call changes nothing."""
        timeout = self.config.hang_timeout_seconds
        if self._parts.place.is_launched:
            timeout = collective_timeout(timeout)
        self._parts.ranks.join(timeout)

    def set_seed(self, seed: int | None = None, bias: int | bool | None = None) -> int:
        """Seed Python, NumPy, torch and CUDA of this rank with `seed + bias`; return that sum.

        Args:
            seed: default: the config's. 0 is a seed.
            bias: default: the rank, so that ranks differ in augmentation and dropout; False for none.
        """
        seed = self.config.seed if seed is None else seed
        offset = self.rank if bias is None or bias is True else int(bias)
        return seeding.seed_everything(seed + offset)

    def set_deterministic(self) -> None:
        """Ask torch for deterministic algorithms; one that has none raises when it is used."""
        seeding.set_deterministic()

    def unwrap(self, model: Any) -> Any:
        """Return the user's module, without DDP and `torch.compile` around it."""
        return unwrap(model)

    def close(self) -> None:
        super().close()
        parts = self._parts
        parts.splits.close()
        parts.stop, parts.epoch.split = NeverStopping(), None
        parts.setup.is_announced, parts.setup.is_resume_due = False, True
        parts.generators.release()

    def _make_parts(self, stated: Values) -> Parts:
        check_named(self.config)
        if self.config.float32_matmul_precision is not None:
            torch.set_float32_matmul_precision(self.config.float32_matmul_precision)
        parts = make_parts(self.config, stated, self)
        register_parts(parts, self, self._metrics_in_use)
        return parts

    def _set_up(
        self, train_splits: Sequence[str] | None, evaluate_splits: Sequence[str] = (), *, resume: bool = True
    ) -> None:
        parts, setup = self._parts, self._parts.setup
        if self.model is None:
            raise ConfigError(f"{type(self).__name__} sets no model: assign self.model in __init__")
        with setup.under_way():
            self._set_up_once(train_splits, evaluate_splits, resume)
        if parts.session.is_open and not setup.is_announced:
            self._announce()

    def _set_up_once(
        self, train_splits: Sequence[str] | None, evaluate_splits: Sequence[str], resume: bool
    ) -> None:
        parts, setup = self._parts, self._parts.setup
        if not setup.is_placed:
            trainable.place(parts, self)
        elif not setup.is_trainable:  # weights may have been loaded or changed by hand since
            parts.modules.equalize()
        metrics = {n: getattr(self, n) for n in ("metrics", "train_metrics", "evaluate_metrics")}
        trained = "metrics" if self.train_metrics is None else "train_metrics"
        set_up.check_metrics(
            metrics, is_distributed=self.distributed, trained=None if train_splits is None else trained
        )
        if self.criterion is not None:
            steps = {"train_step": train_splits, "evaluate_step": evaluate_splits}
            used = [name for name, splits in steps.items() if splits]
            default = [name for name in used if getattr(type(self), name) is getattr(TorchRunner, name)]
            set_up.check_reduction(self.criterion, default)
        if train_splits is not None and not setup.is_trainable:
            trainable.make_trainable(parts, self, train_splits)
            if train_splits:
                self._rehearse(train_splits[0])
            setup.is_trainable = parts.state.is_fixed = True
        for split in evaluate_splits:
            parts.splits.evaluate_loader(split)
        if resume and train_splits and setup.is_resume_due:
            try_data(parts, train_splits, evaluate_splits)
        if resume and (setup.is_resume_due if train_splits is not None else not setup.has_weights):
            record = restore.newest(parts.session.files, parts.ranks)
            if record is not None:
                self._apply(restore.read(record, parts.session.files, parts.place.local_checkpoint_dir))
                setup.resumed = {"step": self.steps, "epoch": self.epochs, "record": record.name}
            elif train_splits and parts.session.is_open:
                setup.begun_with = begin(self.config, self, self._apply, is_main=self.is_main_process)
                if self.config.sanity_batches:
                    look(
                        parts,
                        self,
                        train_splits,
                        list(dict.fromkeys([*evaluate_splits, *setup.to_evaluate_at_end])),
                    )
            setup.is_resume_due = setup.is_resume_due and train_splits is None
        setup.has_weights = True

    def _rehearse(self, split: str) -> None:
        """Make two training steps that leave no trace, where `DataParallel.needs_rehearsal` says so. Collective."""
        if not self._parts.strategy.needs_rehearsal(list(self._parts.modules.wrapped.values())):
            return
        self._parts.modules.train()
        with (
            set_up.explaining_batch_norm(split, self.rank, lambda: 0),
            self._parts.strategy.rehearsing(list(self._parts.modules.own.values())),
        ):
            batch = to_device(self._parts.splits.stream(split).first_batch(), self.device)
            if batch is None:
                raise ConfigError(f"split {split!r} gives no batch: its data is empty")
            for _ in range(2):
                with self.in_step(REHEARSAL):
                    self.train_step(batch)

    def _announce(self) -> None:
        """Begin to listen for a stop, and to write. Collective."""
        parts, setup = self._parts, self._parts.setup
        parts.stop = set_up.begin_stopping(parts.place.context, parts.ranks, self.config.max_seconds)
        stated = self.config.nproc_per_node
        if stated != "auto" and stated * self.config.nnodes != self.world_size:
            setup.not_bitwise(
                f"it is trained on {self.world_size} rank(s), and the config says {stated * self.config.nnodes}"
            )
        if not setup.is_bitwise:  # stays so: a status is built on the last
            parts.session.files.write_status(bitwise=False, not_bitwise="; ".join(setup.reasons) or None)
        by_hand = self.steps and not setup.was_announced and self.config.checkpoint is None
        if by_hand and setup.resumed is None and self.is_main_process:
            self.logger.warning(
                "%d steps were made before train(): they count, and the run ends so much earlier", self.steps
            )
        parts.timings.begin(self.steps)
        parts.session.steps_at_start = self.steps
        self.init_tensorboard()
        setup.is_announced = setup.was_announced = True
        if parts.session.is_writing:
            if (
                setup.resumed is not None
            ):  # the files may be ahead of the checkpoint, or damaged by a loss of power
                self.save_result()
            self.emit(
                "run_started",
                world_size=self.world_size,
                device=str(self.device),
                resumed=setup.resumed,
                begun_with=setup.begun_with,
                environment=environment(self.device),
                epochs=self.epochs,
                steps=self.steps,
                iters=self.iters,
            )


def _input_and_target(data: Any) -> tuple[Any, Any]:
    # nearly always; isinstance of an ABC costs a microsecond
    if type(data) in (tuple, list) and len(data) == 2:
        return data[0], data[1]
    if isinstance(data, Mapping) and "input" in data:
        return data["input"], data.get("target")
    is_sequence = isinstance(data, Sequence) and not isinstance(data, str)
    if is_sequence and len(data) == 2:
        return data[0], data[1]
    if is_sequence and len(data) == 1:
        return data[0], None
    what = f"mapping of {sorted(map(str, data))}" if isinstance(data, Mapping) else type(data).__name__
    if is_sequence:
        what += f" of {len(data)}"
    raise ConfigError(
        f"a batch is a {what}: return (input, target) or a mapping with 'input' and 'target' from the "
        "data set, or override train_step and evaluate_step"
    )
