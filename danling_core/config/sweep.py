"""Experiments and groups as files: a config and what varies in it, expanded into the configs of all runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from danling_core.config.config import Config, check_kind, renamed, renamed_overrides, runner_beside
from danling_core.config.documents import as_mapping, canonical_json, plain, read_mapping
from danling_core.config.field_types import Count, Name, Values
from danling_core.config.overrides import Overrides, apply, expand, parse_sweep, run_names
from danling_core.config.validation import Model, labelled
from danling_core.errors import ConfigError

AT_A_TIME = 50
"""Runs under way at a time where each is a flow run of a deployment."""


@dataclass(frozen=True)
class ExperimentPlan:
    """An experiment and the config of each of its runs."""

    name: str
    configs: list[Config]


def _plain(value: Any) -> Any:
    return plain(value)


def _as_overrides(value: Any) -> Any:
    """Return overrides as a mapping: `["seed=1"]` and `{seed: 1}` are the same."""
    if not isinstance(value, (list, tuple, Mapping)):
        raise ConfigError(
            f"overrides: wanted a mapping or a list of 'key=value', found a {type(value).__name__}"
        )
    return plain(value) if isinstance(value, Mapping) else apply({}, value)


PlainValues = Annotated[Values, BeforeValidator(_plain)]


class Approval(Model):
    """A gate before an experiment of a group: somebody has to say yes in Prefect before it begins."""

    timeout_seconds: Count = Field(86_400, description="how long to wait; a day")
    on_timeout: Literal["stop", "begin"] = Field(
        "stop",
        description="stop: what is left is not begun, and the next start of the group asks again; begin: go on",
    )
    message: str = Field("", description="shown above the form")


class FanOut(Model):
    """Place where the runs of an experiment or group train, and how many at a time."""

    concurrency: Count = Field(1, description="runs at a time; with `executor: deployment` 50 unless stated")
    executor: Literal["local", "deployment"] = Field(
        "local", description="local: here; deployment: each as a flow run of a deployment, on its work pool"
    )
    deployment: str = Field(
        "", description="of `executor: deployment`: `run/NAME`; the only one of the flow `run` unless stated"
    )

    @property
    def local_slots(self) -> int:
        """Return how many runs train at a time on this machine."""
        return self.concurrency if self.executor == "local" else 1

    @model_validator(mode="before")
    @classmethod
    def _many_at_a_time(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("executor") == "deployment":
            return {"concurrency": AT_A_TIME, **values}
        return values

    @model_validator(mode="after")
    def _check_deployment(self) -> Self:
        if self.deployment and self.executor == "local":
            raise ValueError(f"deployment is {self.deployment!r}, which is for executor: deployment")
        if self.deployment and not self.deployment.startswith("run/"):
            raise ValueError(
                f"deployment: wanted a deployment of the flow run, run/NAME, found {self.deployment!r}"
            )
        return self


class ExperimentSpec(FanOut):
    """One experiment: a config, and a sweep or a list of runs over it."""

    config: PlainValues = Field(description="the config that all runs share; in a file also a path to one")
    sweep: PlainValues | None = Field(None, description="values to combine: {optim.lr: [1e-3, 3e-3]}")
    runs: list[PlainValues] | None = Field(None, description="overrides of each run: [{params.width: 16}]")
    overrides: Annotated[Values, BeforeValidator(_as_overrides)] = Field(
        {}, description="applied to the config before what varies"
    )
    approval: Approval | None = Field(
        None,
        description="in a group: begins when all experiments above it have ended, and somebody has approved: "
        "{timeout_seconds: 3600}",
    )

    @model_validator(mode="after")
    def _check_variation(self) -> Self:
        if self.sweep is not None and self.runs is not None:
            raise ValueError("sweep and runs are both given: a grid or a list, not both")
        if self.runs is not None and not self.runs:
            raise ValueError("runs: wanted one or more runs, found none")
        return self

    @classmethod
    def load(cls, file: str | Path, overrides: Overrides = (), sweep: Sequence[str] = ()) -> Self:
        """Return the experiment in a YAML or JSON file, checked to the last run.

        A `config` that is a path is relative to the file, and is read here: the result needs no file.

        Args:
            overrides: change what all runs share.
            sweep: `["optim.lr=1e-3,3e-3", ...]`, combined; the file is then that of a run, or of an experiment in
                which nothing varies.
        """
        try:
            values = _swept(read_mapping(file), sweep)
            check_kind(values, "experiment")
            spec = cls(**_inlined(values, str(file), overrides))
            spec.configs()
        except ConfigError as error:
            raise _once(str(file), error) from None
        return spec

    def configs(self, group: str | None = None) -> list[Config]:
        """Return the config of each run, in order, with names that tell them apart.

        Raises:
            ConfigError: a config is invalid, or two runs are the same.
        """
        if group is None and self.approval is not None:
            raise ConfigError(
                "approval: only an experiment of a group waits for one, and this one stands alone"
            )
        shared = _overridden(self.config, self.overrides)
        varied = expand(self)
        names = run_names(str(shared.get("run_name", "run")), varied)
        configs = []
        for number, (changes, name) in enumerate(zip(varied, names, strict=True), start=1):
            given = {"run_name": name} if group is None else {"run_name": name, "group": group}
            try:
                configs.append(Config.from_dict({**_overridden(shared, changes), **given}))
            except ConfigError as error:
                raise labelled(f"run {number} ({name})", error) if len(varied) > 1 else error from None
        _refuse_repeats(configs)
        return configs

    def plan(self, group: str | None = None) -> ExperimentPlan:
        """Return the configs of all runs, under the experiment's name."""
        configs = self.configs(group)
        return ExperimentPlan(configs[0].experiment_name, configs)


class GroupSpec(FanOut):
    """Experiments with something in common, run and compared together."""

    group: Name = Field(description="the group's name: a tag, a field of each run's metadata, a leaderboard")
    experiments: list[ExperimentSpec] = Field(min_length=1, description="what to run")

    @classmethod
    def load(cls, file: str | Path, overrides: Overrides = ()) -> Self:
        """Return the group in a YAML or JSON file, checked to the last run; see `ExperimentSpec.load`."""
        try:
            values = read_mapping(file)
            check_kind(values, "group")
            experiments = values.get("experiments")
            if isinstance(experiments, list):
                values["experiments"] = [
                    _inlined(as_mapping(one, f"experiments.{index}"), str(file), overrides)
                    for index, one in enumerate(experiments)
                ]
            spec = cls(**values)
            spec.configs()
        except ConfigError as error:
            raise _once(str(file), error) from None
        return spec

    @model_validator(mode="after")
    def _check_experiments(self) -> Self:
        if self.experiments[0].approval is not None:
            raise ValueError(
                "experiments.0: approval is a gate after other experiments, and nothing is above it"
            )
        for index, experiment in enumerate(self.experiments):
            if experiment.executor != "local":
                raise ValueError(
                    f"experiments.{index}: executor belongs to the group, beside its concurrency"
                )
        return self

    def parts(self) -> list[list[int]]:
        """Return the indices of the experiments between approvals: each part after the first begins with a gate."""
        parts: list[list[int]] = [[]]
        for index, experiment in enumerate(self.experiments):
            if experiment.approval is not None:
                parts.append([])
            parts[-1].append(index)
        return parts

    def configs(self) -> list[ExperimentPlan]:
        """Return the plan of each experiment, with `group` set in each config.

        Raises:
            ConfigError: a config is invalid, or two runs are the same.
        """
        plans = []
        for index, experiment in enumerate(self.experiments):
            try:
                plans.append(experiment.plan(self.group))
            except ConfigError as error:
                raise labelled(f"experiments.{index}", error) from None
        configs = [config for plan in plans for config in plan.configs]
        _refuse_repeats(configs)
        return plans


def _swept(values: Values, sweep: Sequence[str]) -> Values:
    """Return the values of an experiment that sweeps a run, or an experiment in which nothing varies."""
    if not sweep:
        return values
    if "sweep" in values or "runs" in values:
        raise ConfigError(
            "the file has a sweep or runs of its own: leave out --sweep, or give the run's file"
        )
    if "config" not in values:
        check_kind(values, "run")
        values = {"config": values}
    return {**values, "sweep": parse_sweep(sweep)}


def _inlined(values: Values, file: str, overrides: Overrides) -> Values:
    """Return the values of an experiment with its config read, and `overrides` after its own."""
    config = values.get("config")
    if isinstance(config, str):
        path = _beside(file, config)
        values = {**values, "config": runner_beside(read_mapping(path), path)}
    elif isinstance(config, Mapping):
        values = {**values, "config": runner_beside(config, file)}
    if overrides:
        own = _as_overrides(values.get("overrides") or {})
        values = {**values, "overrides": apply(own, renamed_overrides(overrides))}
    return values


def _beside(file: str, path: str) -> str:
    if "://" in path or Path(path).is_absolute():
        return path
    folder, slash, _ = file.rpartition("/")
    return f"{folder}{slash}{path}"


def _overridden(config: Values, overrides: Overrides) -> Values:
    return apply(renamed(config), renamed_overrides(overrides))


def _refuse_repeats(configs: Sequence[Config]) -> None:
    """Refuse an experiment that has one run twice: names are labels, and make no other run."""
    first: dict[str, Config] = {}
    for config in configs:
        key = canonical_json([config.experiment_name, config.experiment_id, config.canonical()])
        twin = first.setdefault(key, config)
        if twin is not config:
            raise ConfigError(
                f"runs {twin.run_name!r} and {config.run_name!r} of {config.experiment_name!r} are the same: "
                "nothing that can change a result differs. Leave one out, or give it another seed"
            )


def _once(file: str, error: ConfigError) -> ConfigError:
    return error if str(error).startswith(file) else labelled(file, error)
