"""`Config`: everything that a run is asked for, frozen and closed; read from and written to YAML and JSON exactly."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from danling_core.config import canonical, documents
from danling_core.config.elsewhere import NAMES
from danling_core.config.field_types import (
    BatchLimits,
    Count,
    CountOrAuto,
    ExperimentId,
    FreeValues,
    LocalFolder,
    Name,
    NonNegativeWhole,
    Positive,
    RunnerPath,
    Slots,
    StorageBlock,
    StorageOptions,
    Url,
    Values,
)
from danling_core.config.overrides import Overrides, apply
from danling_core.config.sections import (
    NOT_IDENTITY,
    AverageConfig,
    CallbackConfig,
    CompileOptions,
    DataLoaderConfig,
    FreeParams,
    LoaderOptions,
    OptimConfig,
    Params,
    PretrainedConfig,
    ProfileConfig,
    SchedulerConfig,
)
from danling_core.config.validation import Model, labelled
from danling_core.errors import ConfigError

__all__ = [
    "AverageConfig",
    "CallbackConfig",
    "Config",
    "DataLoaderConfig",
    "FreeParams",
    "LoaderOptions",
    "OptimConfig",
    "Params",
    "SchedulerConfig",
]

_OLD_NAMES = {"experiments_root": "project_root", "index_set": "score_split", "index": "score_name"}
_ENDS = ("epoch_end", "step_end", "iter_end")


def _aside(default: Any, description: str, **rules: Any) -> Any:
    """Return a field that cannot change a result, and so stays out of the run's identity."""
    return Field(default, description=description, json_schema_extra=NOT_IDENTITY, **rules)


_CHANGED_OFTEN = (
    *("experiment_name", "run_name", "runner", "project_root", "seed", "epoch_end", "dataloader", "optim"),
    *("scheduler", "params", "nproc_per_node"),
)


_SECTIONS = {
    "name": "Place",
    "deterministic": "Length and score",
    "log": "Logs",
    "save_interval": "Checkpoints",
    "precision": "Step",
    "device": "Machine and stages",
}
"""Sections of a form, by the key that each begins with; what people change first stands above them."""


def _as_form(schema: dict[str, Any]) -> None:
    """Order and title the keys for a form: first what people change first, then the others in named sections."""
    known = schema["properties"]
    section = ""
    for name, key in known.items():
        section = _SECTIONS.get(name, section)
        key["title"] = name if name in _CHANGED_OFTEN else f"{section}: {name}"
    schema["properties"] = {name: known[name] for name in (*_CHANGED_OFTEN, *known)}


class Config(Model):
    """Configuration of a run: frozen, closed to unknown keys, free of secrets. Raises ConfigError for a bad value.

    Exactly one of `epoch_end`, `step_end` and `iter_end` is given. Fields whose schema says
    `identity: false` cannot change a result and stay out of the run's identity. Flows take it as parameter.
    """

    model_config = ConfigDict(json_schema_extra=_as_form)

    experiment_name: Name = _aside("experiment", "what was run: the unit of code")
    run_name: Name = _aside("run", "which of its runs: the unit of execution")
    name: Name | None = _aside(None, "in place of {experiment_name}-{run_name}")
    experiment_id: ExperimentId | None = _aside(
        None, "the code's id (a git commit); null: computed from the runner's repository"
    )
    group: Name | None = _aside(None, "what this run has in common with others")
    runner: RunnerPath | None = Field(
        None, description="package.module:Class or path/to/file.py:Class (relative to the current folder)"
    )
    project_root: Url = _aside("experiments", "where runs are stored: a folder or any fsspec URL")
    dir: Url | None = _aside(None, "this run's folder, in place of {project_root}/{name}-{id}/{timestamp}")
    log_path: Url | None = _aside(
        None, "the text log, in place of {dir}/run.log; one on a store gets there when the run ends"
    )
    checkpoint_dir: Url | None = _aside(
        None, "the checkpoints, in place of {dir}/{checkpoint_dir_name}; refused for a run on a store"
    )
    checkpoint_dir_name: Name = _aside(
        "checkpoints", "the name of the checkpoints' folder in the run's folder"
    )
    scratch: LocalFolder | None = _aside(
        None, "local folder for the work of runs that are stored remotely; null: a temporary one"
    )
    storage_options: StorageOptions = _aside(
        {}, "fsspec options that are not secret: endpoint_url, region, project"
    )
    storage_block: StorageBlock | None = _aside(
        None,
        "flows: Prefect block with the store's credentials, `aws-credentials/NAME`, `minio-credentials/NAME` or "
        "`gcp-credentials/NAME`; null: the environment's",
    )
    slots: Slots = _aside(
        {},
        "flows: slots of Prefect's global concurrency limits that the run holds while it trains, `{gpu: 1}`; a "
        "limit that is missing is made, of that size",
    )
    upload_interval_seconds: Positive = _aside(
        30.0, "remote runs: seconds between uploads of logs and TensorBoard; results go up at every epoch"
    )
    max_unsynced_seconds: Positive | None = _aside(
        None,
        "remote runs: save and stop, to be resumed, when the store has had nothing for so long; null: go on",
    )
    max_scratch_bytes: Count | None = _aside(
        None, "remote runs: save and stop, to be resumed, when the run's scratch folder has grown beyond this"
    )

    seed: NonNegativeWhole = Field(0, lt=2**63, description="the seed, obeyed exactly; 0 is a seed")
    deterministic: bool = Field(False, description="only deterministic algorithms")
    epoch_end: Count | None = Field(None, description="stop after this many epochs (passes over the data)")
    step_end: Count | None = Field(None, description="stop after this many steps (optimizer updates)")
    iter_end: Count | None = Field(
        None, description="stop after this many iters (forward and backward passes)"
    )
    steps_per_epoch: Count | None = Field(None, description="length of an epoch, for data without a length")
    accum_steps: Count = Field(1, description="iters per step: gradients accumulated before an update")
    evaluate_every: Count = Field(1, description="epochs between evaluations")
    evaluate_interval_steps: Count | None = Field(
        None,
        description="steps between evaluations, when step_end or iter_end drives; null: at each epoch's end",
    )
    limit_batches: BatchLimits = Field(
        {},
        description="batches of a pass over each split, on each rank: a number, or a fraction of them: "
        "{train: 100, val: 0.1}",
    )
    overfit_batches: Count | None = Field(
        None,
        description="train on the same first batches in every epoch, so many, not shuffled; of the other splits "
        "as many. A model that can learn at all learns them by heart",
    )
    fast_dev_run: Count | None = Field(
        None,
        description="try everything once: so many batches of every split, and one epoch (in step mode, so many steps)",
    )
    patience: Count | None = Field(
        None, description="stop after this many evaluations without a better score"
    )
    score_split: str | None = Field(
        None, min_length=1, description="split that is scored; null: val, validate, ..."
    )
    score_name: str = Field("loss", min_length=1, description="metric that is the score")
    score_mode: Literal["min", "max"] | None = Field(
        None, description="better is less or more; null: as is known"
    )

    sanity_batches: NonNegativeWhole = _aside(
        2,
        "batches of each evaluation split, and one of training, that are tried before the first step; 0: none",
    )
    log: bool = _aside(True, "keep a text log; false: what launched ranks print is dropped")
    log_interval: Count | None = _aside(
        50, "iters between reports inside an epoch: progress, and the curves over steps; null: none"
    )
    profile: ProfileConfig | None = _aside(
        None, "profile a few steps, with traces in {dir}/profile: {wait: 5, active: 3}; {}: its defaults"
    )
    tensorboard: bool = _aside(False, "write TensorBoard files")
    loggers: tuple[Literal["wandb", "mlflow"], ...] = _aside(
        (), "services to tell of config, results and score, too; each needs the extra of its name"
    )
    progress_bar: bool = _aside(True, "show a progress bar on a terminal")
    save_interval: Count | None = _aside(None, "epochs between kept epoch-N checkpoints")
    save_interval_steps: Count | None = _aside(None, "steps between checkpoints inside an epoch")
    keep_last: Count = _aside(
        2, "newest checkpoints to keep, besides best, epoch-N and whatever else was saved by name"
    )

    dataloader: DataLoaderConfig = Field(DataLoaderConfig(), description="how data is loaded, per split")
    optim: OptimConfig | None = Field(None, description="the optimizer; null: set by the runner")
    scheduler: SchedulerConfig | None = Field(
        None, description="the schedule; null: none, or set by the runner"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="autocast type; fp16 scales gradients"
    )
    clip_grad_norm: Positive | None = Field(None, description="largest norm of all gradients together")
    clip_grad_value: Positive | None = Field(None, description="largest absolute value in a gradient")
    pretrained: PretrainedConfig | None = Field(
        None, description="weights that a new run begins with: a path or URL, or {path: ..., strict: false}"
    )
    checkpoint: Url | None = Field(
        None, description="a whole state that a new run begins with: a run's folder, or a checkpoint in it"
    )
    ema_decay: Positive | None = Field(
        None,
        lt=1,
        description="decay of the weights' moving average, short for average: {decay: ...}; null: none",
    )
    average: AverageConfig | None = Field(
        None, description="an average of the weights, used to evaluate and infer; null: none"
    )
    non_finite: Literal["raise", "skip"] = Field(
        "raise", description="when a loss or a gradient is NaN or infinite"
    )
    compile: CompileOptions = Field(
        False, description="torch.compile the model; a mapping has its arguments, and which modules"
    )
    activation_checkpointing: list[str] = Field(
        [],
        description="modules, by their places in the model (`blocks.*`) or their classes, whose activations are "
        "computed again in the backward pass: less memory, more time",
    )
    float32_matmul_precision: Literal["highest", "high", "medium"] | None = Field(
        None, description="as torch.set_float32_matmul_precision takes it; null: as it is"
    )
    channels_last: bool = Field(False, description="channels-last memory format for images")
    find_unused_parameters: bool = Field(False, description="DDP: parameters may take no part in a step")
    broadcast_buffers: bool = Field(True, description="DDP: rank 0's buffers go to all before each forward")
    callbacks: tuple[CallbackConfig, ...] = Field(
        (),
        description="callbacks, called before those that the runner sets: paths of their classes, or mappings",
    )
    params: FreeValues = Field({}, description="the user's hyperparameters")

    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = Field(
        "auto",
        description="auto: the accelerator that torch finds (CUDA or ROCm, XPU, Apple's MPS), else the CPU",
    )
    nproc_per_node: CountOrAuto = Field("auto", description="ranks per machine; auto: its GPUs, else 1")
    nnodes: Count = Field(1, description="machines")
    threads_per_rank: Count = Field(1, description="CPU threads of each rank")
    stages: tuple[Literal["train", "evaluate"], ...] = _aside(
        ("train", "evaluate"), "what to do", min_length=1
    )
    evaluate_splits: list[str] | None = _aside(
        None, "splits of the evaluate stage; null: test, or the score split"
    )
    max_restarts: NonNegativeWhole = _aside(3, "relaunches after a rank was killed or hung")
    hang_timeout_seconds: Positive = _aside(
        600.0,
        "silence of a rank, since its last step or evaluated batch, after which all are relaunched; before the end of "
        "its first step at least 1800. Under torchrun: how long a rank waits for the others",
    )
    max_seconds: Positive | None = _aside(None, "time after which the run saves and stops, to be resumed")
    stop_grace_seconds: Positive = _aside(30.0, "time that ranks have to save when asked to stop")

    @classmethod
    def elsewhere(cls) -> Mapping[str, list[str] | str]:
        """Return keys that belong to a section or have another name here, and the dotted keys that were meant."""
        keys = {
            "dataloader": [*DataLoaderConfig.model_fields],
            "scheduler": [*SchedulerConfig.model_fields],
            "optim": [*OptimConfig.model_fields, "weight_decay", "momentum", "betas"],
        }
        in_sections = {
            key: [f"{section}.{key}", f"params.{key}"]
            for section, known in keys.items()
            for key in known
            if key not in cls.model_fields
        }
        return {**NAMES, **in_sections}

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, values: Any) -> Any:
        return renamed(values) if isinstance(values, Mapping) else values

    @model_validator(mode="before")
    @classmethod
    def _shorten(cls, values: Any) -> Any:
        batches = values.get("fast_dev_run") if isinstance(values, Mapping) else None
        if not isinstance(batches, int) or isinstance(batches, bool):
            return values
        shorter = {"epoch_end": 1, **dict.fromkeys(("step_end", "iter_end", "steps_per_epoch"), batches)}
        return {
            **values,
            **{
                name: min(values[name], end)
                for name, end in shorter.items()
                if isinstance(values.get(name), int)
            },
        }

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        given = [name for name in ("limit_batches", "overfit_batches", "fast_dev_run") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} are both given: each says how many batches there are, give one"
            )
        return self

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.average is not None and self.ema_decay is not None:
            raise ValueError("average and ema_decay are both given: give average alone")
        if self.pretrained is not None and self.checkpoint is not None:
            raise ValueError(
                "pretrained and checkpoint are both given: a checkpoint has weights, too; give one"
            )
        return self

    @model_validator(mode="after")
    def _check_ends(self) -> Self:
        given = [name for name in _ENDS if getattr(self, name) is not None]
        if not given:
            raise ValueError(f"one of {', '.join(_ENDS)} must be given: it says when training ends")
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} are both given: only one can end training (set the other to null)"
            )
        if self.evaluate_interval_steps is not None and self.epoch_end is not None:
            raise ValueError(
                "evaluate_interval_steps needs step_end or iter_end; with epoch_end use evaluate_every"
            )
        return self

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | Config, overrides: Overrides = ()) -> Self:
        """Return a config from a YAML or JSON file, a URL or a mapping; `overrides` come before it is checked.

        Relative locations inside the config are relative to the current folder, not to the file.

        Args:
            source: file, URL, mapping or another config.
            overrides: `["optim.lr=1e-3", ...]`, or a mapping with dotted or nested keys.
        """
        if isinstance(source, Config):
            return cls.from_dict(apply(source.dict(), renamed_overrides(overrides)))
        if isinstance(source, Mapping):
            return cls.from_dict(apply(renamed(source), renamed_overrides(overrides)))
        return cls._of_file(documents.read_mapping(source), str(source), overrides)

    @classmethod
    def _of_file(cls, values: Mapping[str, Any], file: str, overrides: Overrides = ()) -> Self:
        try:
            check_kind(values, "run")
            return cls.from_dict(apply(renamed(runner_beside(values, file)), renamed_overrides(overrides)))
        except ConfigError as error:
            raise labelled(file, error) from None

    def limit_of(self, split: str) -> int | float | None:
        """Return how many batches of a split make a pass: a number, a fraction, or None for all."""
        return self.fast_dev_run or self.overfit_batches or self.limit_batches.get(split)

    @property
    def averaging(self) -> AverageConfig | None:
        """Return how weights are averaged, whichever key says so."""
        return self.average if self.ema_decay is None else AverageConfig(decay=self.ema_decay)

    def override(self, overrides: Overrides) -> Self:
        """Return a new config with dotted overrides applied: `config.override(["params.lr=0.01"])`."""
        return type(self).load(self, overrides)

    def replace(self, **fields: Any) -> Self:
        """Return a new config, checked again, with whole fields replaced: `config.replace(experiment_id=...)`."""
        return self.from_dict({**self.dict(), **fields})

    def canonical(self) -> Values:
        """Return the fields that the run id hashes: those that can change a result and differ from their default."""
        return canonical.canonical(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return a config from a mapping."""
        return cls(**documents.as_mapping(values, "config"))

    def dict(self) -> Values:  # type: ignore[override]
        """Every field, defaults too, as plain values: `from_dict` gives an equal config."""
        return self.model_dump(mode="json")

    def yamls(self) -> str:
        """YAML text that `from_yamls` turns back into an equal config."""
        return documents.dump_yaml(self.dict())

    def yaml(self, file: str | Path) -> None:
        """Write `yamls()` to a file or URL."""
        documents.write_text(file, self.yamls())

    def jsons(self) -> str:
        """JSON text that `from_jsons` turns back into an equal config."""
        return documents.dump_json(self.dict())

    def json(self, file: str | Path) -> None:  # type: ignore[override]
        """Write `jsons()` to a file or URL."""
        documents.write_text(file, self.jsons() + "\n")

    @classmethod
    def from_yamls(cls, text: str) -> Self:
        """Return a config from YAML text."""
        return cls.from_dict(documents.as_mapping(documents.parse_yaml(text), "YAML"))

    @classmethod
    def from_yaml(cls, file: str | Path) -> Self:
        """Return a config from a file or URL that holds YAML, whatever its name."""
        label = str(file)
        value = documents.parse_yaml(documents.read_text(label), label)
        return cls._of_file(documents.as_mapping(value, label), label)

    @classmethod
    def from_jsons(cls, text: str) -> Self:
        """Return a config from JSON text."""
        return cls.from_dict(documents.as_mapping(documents.parse_json(text), "JSON"))

    @classmethod
    def from_json(cls, file: str | Path) -> Self:
        """Return a config from a file or URL that holds JSON, whatever its name."""
        label = str(file)
        value = documents.parse_json(documents.read_text(label), label)
        return cls._of_file(documents.as_mapping(value, label), label)


def runner_beside(values: Mapping[str, Any], file: str) -> Mapping[str, Any]:
    """Return the values of a config file; a runner in a file is looked for beside it first, then in the current folder.

    What is found beside it alone is named by its whole path, so that the run can be started from anywhere.
    """
    path, colon, name = str(values.get("runner") or "").rpartition(":")
    if not path.endswith(".py") or "://" in file or os.path.isabs(path):
        return values
    beside = Path(file).expanduser().resolve().parent / path
    if not beside.is_file() or beside == Path(path).resolve():
        return values
    return {**values, "runner": f"{beside}{colon}{name}"}


def check_kind(values: Mapping[str, Any], wanted: Literal["run", "experiment", "group"]) -> None:
    """ConfigError where a file holds, by its keys, one of the other two kinds: it names the command for it."""
    by_key = {
        "group": ("experiments",),
        "experiment": ("config",),
        "run": (*_ENDS, "runner", "params", "optim", "dataloader"),
    }
    kind = next((kind for kind, keys in by_key.items() if any(key in values for key in keys)), wanted)
    if kind != wanted:
        hint = ", or `danling experiment FILE --sweep optim.lr=1e-3,3e-3`" if kind == "run" else ""
        raise ConfigError(
            f"wanted the file of {_an(wanted)}; this is the file of {_an(kind)}: `danling {kind} FILE`{hint}"
        )


def _an(kind: str) -> str:
    return f"an {kind}" if kind[0] == "e" else f"a {kind}"


def renamed_overrides(overrides: Overrides) -> Overrides:
    """Return overrides with older field names replaced by today's."""
    if isinstance(overrides, (str, Mapping)):
        return renamed(overrides) if isinstance(overrides, Mapping) else overrides
    return [_renamed_text(text) if isinstance(text, str) else text for text in overrides]


def _renamed_text(text: str) -> str:
    key, equals, value = text.partition("=")
    return f"{_OLD_NAMES.get(key.strip(), key)}{equals}{value}"


def renamed(values: Mapping[str, Any]) -> Values:
    """Return the mapping with older field names replaced by today's."""
    for old, new in _OLD_NAMES.items():
        if old in values and new in values:
            raise ConfigError(f"{old} and {new} are both given: they are one setting, give {new} only")
    return {_OLD_NAMES.get(key, key): value for key, value in values.items()}
