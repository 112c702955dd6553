"""Every method that a runner offers, declared in one place: signatures and meanings, no behaviour."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    from danling_core.runner.loading import LoadedKeys

Values = dict[str, Any]
History = dict[int, dict[str, dict[str, Any]]]
File = str | os.PathLike[str]
Splits = Sequence[str] | str
Action = Literal["warn", "raise", "ignore"]


class RunnerMethods(ABC):
    """The methods of a runner. *Collective*: every rank calls it. Files are written by rank 0."""

    # train --------------------------------------------------------------------------------------------------
    @abstractmethod
    def train(self, train_splits: Splits | None = None, evaluate_splits: Splits | None = None) -> History:
        """Train to the end, or until patience runs out, resuming what is there; returns `results`.
        Collective.

        Args:
            train_splits: default: those named `train...`.
            evaluate_splits: evaluated after each epoch; default: the others, without `test...` and
                `infer...`.

        Raises:
            RunInterrupted: asked to stop; everything is saved, and the next call resumes.
        """

    @abstractmethod
    def train_epoch(self, split: str = "train") -> Values:
        """Train until the epoch, or in step mode the segment, ends; returns the split's result. Collective."""

    @abstractmethod
    def train_step(self, data: Any) -> tuple[Any, Any]:
        """One iter: forward, loss, metrics, `advance`; override it for other data, or several losses.

        Args:
            data: one batch on the device: `(input, target)`, or a mapping with `input` and `target`.

        Returns:
            the prediction, and the mean loss over the batch (a scalar).
        """

    @abstractmethod
    def advance(self, loss: Any) -> None:
        """Backward and, at the end of an accumulation window, the optimizer's step; once per `train_step`.

        Args:
            loss: mean over this rank's batch, a scalar; weighted here so that the window's gradient is that
                of the mean over all its samples on all ranks.
        """

    @abstractmethod
    def backward(self, loss: Any) -> None:
        """Gradients of `loss`, scaled where fp16 needs it."""

    @abstractmethod
    def autocast(self) -> Any:
        """Context of the forward pass, after `precision`."""

    @abstractmethod
    def unwrap(self, model: Any) -> Any:
        """The user's module, without DDP and `torch.compile` around it."""

    @abstractmethod
    def run(self, stages: Sequence[str] | None = None) -> Any:
        """All stages of the run, then the completion record: what a worker calls. Collective.

        Args:
            stages: of "train" and "evaluate"; default: the config's. The run is complete once training is over
                and evaluated; until then its status stays as it was, or `interrupted`, and it can be resumed.

        Returns:
            the `Status` on rank 0, None elsewhere.

        Raises:
            RunInterrupted: asked to stop; saved, and the next run resumes.
        """

    @abstractmethod
    def finish(self, evaluation: Values | None = None, still_to_do: str | None = None) -> Any:
        """Write the completion record, last of all. Rank 0 writes; others return None.

        Args:
            evaluation: what the evaluate stage came to.
            still_to_do: why the run is not complete, though all that was asked for is done.
        """

    @abstractmethod
    def close(self) -> None:
        """Close files and logs: the end of `train`, `evaluate`, `infer` and `run`. A second call does
        nothing."""

    # evaluate -----------------------------------------------------------------------------------------------
    @abstractmethod
    def evaluate(self, evaluate_splits: Splits | None = None) -> Values:
        """Evaluate splits, without touching `results`; returns `{split: result}`. Collective.

        A runner that has neither trained nor loaded weights takes up its run's newest checkpoint first.
        """

    @abstractmethod
    def evaluate_epoch(self, split: str = "val") -> Values:
        """Evaluate a split: each sample counts once at any world size, EMA weights where there are any.
        Collective."""

    @abstractmethod
    def evaluate_step(self, data: Any) -> tuple[Any, Any]:
        """One batch, without gradients: forward, loss, metrics. Returns the prediction and the mean loss or
        None."""

    @abstractmethod
    def infer(self, split: str = "infer") -> Any:
        """The model's outputs for a split, in data set order, on every rank, on the CPU. Collective."""

    @abstractmethod
    def infer_step(self, data: Any) -> Any:
        """The outputs for one batch: `(batch, ...)`."""

    # setting up ---------------------------------------------------------------------------------------------
    @abstractmethod
    def set_seed(self, seed: int | None = None, bias: int | bool | None = None) -> int:
        """Seed Python, NumPy, torch and CUDA of this rank with `seed + bias`; returns that sum.

        Args:
            seed: default: the config's. 0 is a seed.
            bias: default: the rank, so that ranks differ in augmentation and dropout; False for none.
        """

    @abstractmethod
    def set_deterministic(self) -> None:
        """Ask torch for deterministic algorithms; one that has none raises when it is used."""

    @abstractmethod
    def scale_lr(
        self, lr: float, lr_scale_factor: float | None = None, batch_size_base: int | None = None
    ) -> float:
        """The learning rate after the linear scaling rule (arXiv 1706.02677), also in a runner's `__init__`.

        `lr` times `batch_size_equivalent` over `batch_size_base`, or times a stated factor.

        Raises:
            ConfigError: neither the factor nor the base is given, or both.
        """

    @abstractmethod
    def init_distributed(self) -> None:
        """Pick this rank's device, and join the process group where there are several ranks. Collective."""

    @abstractmethod
    def init_logging(self) -> None:
        """Open the logger named `danling`, with the run's text log on rank 0; the root logger is left alone."""

    @abstractmethod
    def init_print(self, process: int = 0) -> None:
        """Let only rank `process` speak through the logger; `print` itself is left alone."""

    @abstractmethod
    def init_tensorboard(self) -> None:
        """Open the curves (and the progress bar), from where a resume stands. Rank 0; others return."""

    # checkpoints --------------------------------------------------------------------------------------------
    @abstractmethod
    def state_dict(self) -> Values:
        """Everything a bitwise resume needs that is equal on all ranks; per-rank state is gathered beside it.

        A save calls it on rank 0 only: no collective may be in it.
        """

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; every resume calls it, on every rank, once all is set up.

        With `state_dict` the place for state of your own: override both, call `super()` first, and keep to tensors
        and plain values. State that differs between ranks is saved as rank 0 has it.

        Raises:
            CheckpointError: a newer version of danling wrote it.
        """

    @abstractmethod
    def save_checkpoint(
        self, name: str = "latest", epochs: int | None = None, save_best: bool = True
    ) -> None:
        """Save the run's whole state in the background; the loop pays for a copy of it. Collective.

        Args:
            name: the pointer to move; what it names is kept until it moves again.
            epochs: number of the epoch that just ended: kept as `epoch-N` every `save_interval` epochs.
            save_best: also move `best`, where the latest result is the best.

        Raises:
            CheckpointError: an earlier save failed for good.
        """

    @abstractmethod
    def load_checkpoint(self, checkpoint: File | Mapping[str, Any]) -> None:
        """Take over the whole state of a checkpoint; a checkpoint of the run's own wins when `train` begins.
        Collective.

        Args:
            checkpoint: a run's folder, a folder of checkpoints, a checkpoint in it by name
                (`run/checkpoints/epoch-3`), or a file, local or at any URL; or a state.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """

    @abstractmethod
    def load_pretrained(self, checkpoint: File | Mapping[str, Any], strict: bool = True) -> LoadedKeys:
        """Take over weights only, the averaged ones where the checkpoint has them; returns the names left
        out.

        Args:
            checkpoint: as for `load_checkpoint`, or a plain state dict of weights.
            strict: refuse weights that do not fit in name and shape; else take over those that do.

        Raises:
            CheckpointError: with `strict`, weights are missing or unexpected (listed); or nothing fits at
                all.
        """

    @classmethod
    @abstractmethod
    def from_checkpoint(cls, checkpoint: File) -> Self:
        """A runner with the config and the weights of a run: its folder or a checkpoint in it, local or at
        any URL.

        Called on `Runner` itself, the class that the config names is made.
        """

    @abstractmethod
    def load_config(self, checkpoint: File, overwrite: bool = False) -> None:
        """Replace the runner's config by that of a run's folder, or of a checkpoint in it; before training
        begins.

        Args:
            overwrite: also replace what this runner's own config states; else that wins.
        """

    @staticmethod
    @abstractmethod
    def load(file: File) -> Any:
        """What `save` wrote, local or at any URL; code in it is never run."""

    @abstractmethod
    def save(self, obj: Any, file: File, main_process_only: bool = True) -> File:
        """Write an object, by the file's suffix: .pt .pth .bin .ckpt (tensors and plain values), .json,
        .yaml; any URL.

        Returns:
            the file.
        """

    @abstractmethod
    def check_dir(self, action: Action = "warn") -> bool:
        """Whether the run's folder is empty or absent; where it is not: warn, raise `ConfigError`, or ignore
        it."""

    # config -------------------------------------------------------------------------------------------------
    @abstractmethod
    def json(self, file: File) -> None:
        """Write the config as JSON to a file or URL."""

    @abstractmethod
    def jsons(self) -> str:
        """The config as JSON text."""

    @abstractmethod
    def yaml(self, file: File) -> None:
        """Write the config as YAML to a file or URL."""

    @abstractmethod
    def yamls(self) -> str:
        """The config as YAML text."""

    @classmethod
    @abstractmethod
    def from_json(cls, file: File) -> Self:
        """A runner with the config in a JSON file."""

    @classmethod
    @abstractmethod
    def from_jsons(cls, text: str) -> Self:
        """A runner with the config in JSON text."""

    @classmethod
    @abstractmethod
    def from_yaml(cls, file: File) -> Self:
        """A runner with the config in a YAML file."""

    @classmethod
    @abstractmethod
    def from_yamls(cls, text: str) -> Self:
        """A runner with the config in YAML text."""

    @abstractmethod
    def dict(self) -> Values:
        """The whole config as plain values."""

    # results ------------------------------------------------------------------------------------------------
    @abstractmethod
    def append_result(self, result: Mapping[str, Any], index: int | None = None) -> None:
        """Report `{split: {metric: value}}`, merging into what `index` (default: the current epoch) already
        has."""

    @abstractmethod
    def save_result(self) -> None:
        """Replace results.json, latest.json, best.json and status.json. Rank 0 writes; others return."""

    @abstractmethod
    def print_result(self) -> None:
        """Log the latest and the best result, readably. Rank 0 speaks."""

    @abstractmethod
    def get_step_result(self) -> Values:
        """The running loss and metrics of the split being passed over, of this rank. Waits for the device.

        With metrics of torchmetrics it is collective, since they reduce themselves.
        """

    @abstractmethod
    def get_epoch_result(self) -> Values:
        """Loss and metrics of the split being passed over, so far, over all ranks. Collective, one reduction."""

    @abstractmethod
    def step_log(self, split: str, iteration: int, length: int | None = None) -> Values:
        """Log the step's result and, in training, write its curves; returns it. For a user's own loop."""

    @abstractmethod
    def format_step_result(
        self,
        result: Mapping[str, Any],
        split: str = "train",
        steps: int | None = None,
        length: int | None = None,
    ) -> str:
        """One line for a step's result: `train 50/200 | loss 0.1230`."""

    @abstractmethod
    def format_epoch_result(
        self, result: Mapping[str, Any], epochs: int | None = None, total: int | None = None
    ) -> str:
        """One line for an epoch's result: `epoch 3/30 | train loss 0.1230 | val loss 0.2000`."""

    @abstractmethod
    def format_result(self, result: Mapping[str, Any] | None = None) -> str:
        """A result as a small table, a row for each split; by default the latest and the best."""

    @abstractmethod
    def write_result(self, result: Mapping[str, Any], split: str, steps: int | None = None) -> None:
        """Write a result to TensorBoard and `loggers`, a curve `{split}/{metric}` for each; lists and maps
        expand to several.

        Args:
            steps: the position on the curve; default: the completed steps.
        """

    @abstractmethod
    def write_score(self, name: str, score: float, split: str, steps: int | None = None) -> None:
        """Write one point of the curve `{split}/{name}` to TensorBoard and `loggers`, where there are any. Rank 0
        writes."""

    @abstractmethod
    def emit(self, kind: str, **fields: Any) -> None:
        """Append an event of this kind to the run's event log, and tell every writer. Rank 0; others return."""
