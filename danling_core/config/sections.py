"""The sections of a Config: data loading, optimizer, scheduler, and the user's own hyperparameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self

from pydantic import BaseModel, Discriminator, Field, GetJsonSchemaHandler, Tag, model_validator

from danling_core.config.documents import plain
from danling_core.config.field_types import (
    Count,
    NonNegative,
    NonNegativeWhole,
    Positive,
    RunnerPath,
    StepsOrShare,
    Url,
)
from danling_core.config.validation import CLOSED, OPEN, Model
from danling_core.errors import ConfigError
from danling_core.secrets import refuse_in_values, shown
from danling_core.suggest import nearest

NOT_IDENTITY: dict[str, Any] = {"identity": False}  # json_schema_extra of a field that cannot change a result


@dataclass(frozen=True)
class LoaderOptions:
    """Loader options of one split, with all defaults. `batch_size` counts samples per rank and iteration."""

    batch_size: int
    num_workers: int
    shuffle: bool
    drop_last: bool
    pin_memory: bool | None  # None: pinned when the device is CUDA
    persistent_workers: bool
    prefetch_factor: int | None


class SplitOptions(BaseModel):
    """The options of one split; what is not given comes from the `dataloader` section around it."""

    model_config = CLOSED

    batch_size: Count | None = Field(None, description="samples per rank and iteration")
    num_workers: NonNegativeWhole | None = Field(
        None, description="loader processes per rank; 0 loads in the loop"
    )
    shuffle: bool | None = Field(None, description="draw in a new order each epoch (training only)")
    drop_last: bool | None = Field(None, description="leave out the last, smaller batch (training only)")
    pin_memory: bool | None = Field(
        None, description="page-locked host memory; null: when on CUDA", json_schema_extra=NOT_IDENTITY
    )
    persistent_workers: bool | None = Field(None, description="keep loader processes from epoch to epoch")
    prefetch_factor: Count | None = Field(
        None, description="batches that each loader process holds ready", json_schema_extra=NOT_IDENTITY
    )


class DataLoaderConfig(SplitOptions):
    """Options for all splits, and a sub-section for each that differs: `{batch_size: 64, val: {...}}`."""

    model_config = OPEN
    __pydantic_extra__: dict[str, SplitOptions]
    EXTRA: ClassVar[type[BaseModel]] = SplitOptions

    batch_size: Count = Field(32, description="samples per rank and iteration")
    num_workers: NonNegativeWhole = Field(0, description="loader processes per rank; 0 loads in the loop")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_options(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        for key, value in values.items():
            if key not in cls.model_fields and not isinstance(value, (Mapping, SplitOptions)):
                near = nearest(str(key), cls.model_fields)
                hint = f"did you mean {near!r}?" if near else "a split's options are a mapping"
                raise ValueError(f"unknown key {key!r}: {hint}")
        return values

    def for_split(self, split: str, training: bool, trained: bool = False) -> LoaderOptions:
        """Return the options of `split`, resolved.

        Training shuffles and keeps the last batch by default. Evaluation never shuffles or drops.

        Args:
            split: the split's name; its own sub-section goes before the general options.
            training: whether the loader feeds training.
            trained: whether this split is also trained on, and its `shuffle` and `drop_last` are for that.
                The split named `train` always is.

        Raises:
            ConfigError: an evaluation split is to be shuffled, or to lose its last batch.
        """
        own = (self.__pydantic_extra__ or {}).get(split) or SplitOptions()
        if not training and not trained and split != "train":
            for name in ("shuffle", "drop_last"):
                if getattr(own, name):
                    raise ConfigError(
                        f"dataloader.{split}.{name}: wanted false or nothing, found true: an evaluation "
                        f"counts every sample once, in order"
                    )
        workers = self._own_or_general(own, "num_workers")
        return LoaderOptions(
            batch_size=self._own_or_general(own, "batch_size"),
            num_workers=workers,
            shuffle=training and self._own_or_general(own, "shuffle", True),
            drop_last=training and self._own_or_general(own, "drop_last", False),
            pin_memory=self._own_or_general(own, "pin_memory"),
            persistent_workers=workers > 0 and self._own_or_general(own, "persistent_workers", False),
            prefetch_factor=self._own_or_general(own, "prefetch_factor") if workers > 0 else None,
        )

    def _own_or_general(self, own: SplitOptions, name: str, default: Any = None) -> Any:
        for value in (getattr(own, name), getattr(self, name)):
            if value is not None:
                return value
        return default


class _Open(BaseModel):
    """A section whose extra keys are the arguments of the class that it names."""

    model_config = OPEN

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            values = plain(values)
            refuse_in_values(values)
        return values


class OptimConfig(_Open):
    """An optimizer of `torch.optim` by name; extra keys are its arguments: `{name: sgd, momentum: 0.9}`."""

    name: str = Field(min_length=1, description="a class of torch.optim, in any letter case")
    lr: NonNegative | None = Field(None, description="learning rate; null: the class's own default")
    no_decay: list[str] = Field(
        [],
        description="parameters without weight decay: words in their names, or in the names of their modules' "
        "classes, in any letter case: [bias, norm, embed]",
    )
    groups: list[dict[str, Any]] = Field(
        [],
        description='parameters that differ, by a regular expression: [{match: "bias", weight_decay: 0.0}]',
    )

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the optimizer's class: the extra keys, and `lr` where it is given."""
        rate = {} if self.lr is None else {"lr": self.lr}
        return {**rate, **(self.__pydantic_extra__ or {})}


class SchedulerConfig(_Open):
    """A learning-rate schedule by name; extra keys are the arguments of its class."""

    name: str = Field(
        min_length=1,
        description="constant, linear, cosine, wsd, one_cycle, or a class of torch.optim.lr_scheduler",
    )
    warmup_steps: StepsOrShare = Field(
        0, description="optimizer steps of linear warm-up before the schedule; below 1, a share of all steps"
    )
    interval: Literal["step", "epoch"] | None = Field(
        None,
        description="what the schedule counts; null: steps in step mode and for constant, linear, cosine, OneCycleLR, "
        "CyclicLR and LambdaLR; results for ReduceLROnPlateau; else epochs",
    )

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the scheduler's class: the extra keys."""
        return dict(self.__pydantic_extra__ or {})


class AverageConfig(BaseModel):
    """An average of the weights that evaluation and inference use: `{name: ema, decay: 0.999, warmup: true}`."""

    model_config = CLOSED

    name: Literal["ema", "swa"] = Field(
        "ema",
        description="ema: exponential moving average; swa: the equal average of all weights since `start`",
    )
    decay: Positive = Field(0.999, lt=1, description="ema: how much of the average stays at an update")
    warmup: bool = Field(
        False, description="ema: begin with a smaller decay, min(decay, (1 + updates) / (10 + updates))"
    )
    start: StepsOrShare = Field(
        0.75, description="swa: the step after which the average begins; below 1, a share of all steps"
    )
    every_steps: Count = Field(1, description="optimizer steps between two updates")

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        others = {"ema": ("start",), "swa": ("decay", "warmup")}[self.name]
        if odd := [
            key
            for key in others
            if key in self.model_fields_set and getattr(self, key) != _default(self, key)
        ]:
            raise ValueError(f"{', '.join(odd)} means nothing to {self.name!r}")
        return self


def _default(section: BaseModel, key: str) -> Any:
    return type(section).model_fields[key].default


class CompileConfig(BaseModel):
    """Options of `torch.compile`, and which modules it compiles."""

    model_config = CLOSED

    mode: str | None = Field(
        None,
        description="default, reduce-overhead, max-autotune or max-autotune-no-cudagraphs; not with options",
    )
    backend: str = Field("inductor", min_length=1, description="as `torch.compiler.list_backends()` names it")
    dynamic: bool | None = Field(None, description="whether shapes may differ; null: found out")
    fullgraph: bool = Field(False, description="an error where the graph would break")
    options: dict[str, Any] | None = Field(None, description="of the backend")
    modules: list[str] = Field(
        [],
        description="compile these alone, by their places in the model (`blocks.*`) or their classes; []: all",
    )

    @model_validator(mode="after")
    def _check_mode(self) -> Self:
        known = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
        if self.mode is not None and self.mode not in known:
            raise ValueError(f"mode is {self.mode!r}, wanted one of {', '.join(known)}")
        if self.mode is not None and self.options is not None:
            raise ValueError("mode and options are both given: torch.compile takes one of them")
        return self

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `torch.compile`: those that are given."""
        stated = self.model_dump(exclude={"modules"}, exclude_defaults=True)
        return {name: value for name, value in stated.items() if value is not None}


class ProfileConfig(BaseModel):
    """Steps that torch's profiler looks at, counted from the first step of each start, and what it notes."""

    model_config = CLOSED

    wait: NonNegativeWhole = Field(5, description="steps before it")
    warmup: NonNegativeWhole = Field(2, description="steps that are profiled and thrown away")
    active: Count = Field(3, description="steps in a trace")
    repeat: Count = Field(1, description="traces, each after its own wait and warmup")
    record_shapes: bool = Field(False, description="note the shapes of inputs")
    profile_memory: bool = Field(False, description="note what is allocated")
    with_stack: bool = Field(False, description="note the line of source")


CompileOptions = Annotated[
    Annotated[bool, Tag("")] | Annotated[CompileConfig, Tag(" ")],  # tags that no message shows
    Discriminator(lambda value: " " if isinstance(value, (Mapping, CompileConfig)) else ""),
]


class _Shorthand(BaseModel):
    """A section for which a text may stand, the value of its first key."""

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, values: Any) -> Any:
        return {next(iter(cls.model_fields)): values} if isinstance(values, str) else values

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [handler(core_schema), {"type": "string"}]}


class PretrainedConfig(_Shorthand):
    """Weights that a new run begins with. The path alone stands for `{path: ..., strict: true}`."""

    model_config = CLOSED

    path: Url = Field(
        description="a run's folder, a checkpoint in it, or a file of weights, local or at any URL"
    )
    strict: bool = Field(True, description="false: take over what fits, and say what does not")


class CallbackConfig(_Open, _Shorthand):
    """A callback by the path of its class; extra keys are its arguments: `{name: hooks.py:Freeze, until: 3}`.

    The path alone stands for one without arguments.
    """

    name: RunnerPath = Field(description="package.module:Class or path/to/file.py:Class")

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the callback's class: the extra keys."""
        return dict(self.__pydantic_extra__ or {})


class Params(Model):
    """Base of a runner's own typed hyperparameters: frozen and closed.

    Declare fields in a subclass, and name it in the runner as `params: MyParams`. `MyParams(**config.params)`
    raises ConfigError with a line `params.key: ..` for each problem.
    """

    SECTION: ClassVar[str] = "params"


class FreeParams(Mapping[str, Any]):
    """Untyped hyperparameters: any key, read as `params.width` or `params["width"]`, and nested.

    A key that is also the name of a method (`items`, `get`) is the value, as an attribute too. Remembers which keys
    were read: see `unread`.
    """

    __slots__ = ("__dict__", "_read")
    _read: set[str]

    def __init__(self, values: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        merged = {**(values or {}), **more}
        nested = {
            key: FreeParams(item) if isinstance(item, Mapping) else item for key, item in merged.items()
        }
        object.__setattr__(self, "_read", set())
        self.__dict__.update(nested)

    def __getattribute__(self, name: str) -> Any:
        values = object.__getattribute__(self, "__dict__")
        if name not in values:
            return object.__getattribute__(self, name)
        _reads(self).add(name)
        return values[name]

    def __getitem__(self, key: str) -> Any:
        value = self.__dict__[key]
        _reads(self).add(key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__)

    def __len__(self) -> int:
        return len(self.__dict__)

    def __getattr__(self, name: str) -> Any:
        near = nearest(name, self.__dict__)
        hint = f"did you mean {near!r}?" if near else f"known are {sorted(self.__dict__)}"
        raise AttributeError(f"params has no {name!r}: {hint}")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"params are frozen: override 'params.{name}' in the config instead")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"params are frozen: {name!r} cannot be deleted")

    def __eq__(self, other: object) -> bool:
        return self.__dict__ == other.__dict__ if isinstance(other, FreeParams) else self.__dict__ == other

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[FreeParams], tuple[dict[str, Any]]]:
        return FreeParams, (_plain(self),)  # a copy reads nothing

    def __repr__(self) -> str:
        return (
            f"FreeParams({', '.join(f'{key}={shown(item, (key,))}' for key, item in self.__dict__.items())})"
        )

    def model_dump(self) -> dict[str, Any]:
        """Return the values as plain nested dicts, as a typed `Params` gives them. Counts as reading all."""
        for key, item in self.__dict__.items():
            _reads(self).add(key)
            if isinstance(item, FreeParams):
                FreeParams.model_dump(item)
        return _plain(self)


def _plain(params: FreeParams) -> dict[str, Any]:
    return {
        key: _plain(item) if isinstance(item, FreeParams) else item for key, item in params.__dict__.items()
    }


def _reads(params: FreeParams) -> set[str]:
    """Return the set of the keys that were read, whatever the keys are called."""
    found: set[str] = FreeParams.__dict__["_read"].__get__(params)
    return found


def unread(params: FreeParams, prefix: str = "") -> list[str]:
    """Return the dotted keys that nobody has read so far."""
    found: list[str] = []
    for key, value in params.__dict__.items():
        if key not in _reads(params):
            found.append(f"{prefix}{key}")
        elif isinstance(value, FreeParams):
            found += unread(value, f"{prefix}{key}.")
    return found


def read(params: FreeParams, prefix: str = "") -> list[str]:
    """Return the dotted keys that were read."""
    found: list[str] = []
    for key in _reads(params) & set(params.__dict__):
        value = params.__dict__[key]
        found += read(value, f"{prefix}{key}.") if isinstance(value, FreeParams) else [f"{prefix}{key}"]
    return found
