"""Optimizers by name: torch's own classes, with their own arguments."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from danling_core.errors import ConfigError
from danling_core.optim.by_name import check_arguments, find_class


def optimizer_class(name: str, arguments: Mapping[str, Any]) -> type[torch.optim.Optimizer]:
    """Return the optimizer class called `name`, its arguments checked."""
    cls = find_class(torch.optim, torch.optim.Optimizer, name, "optim")
    check_arguments(cls, arguments, "optim")
    check_closure(cls, "optim.name")
    return cls


def check_closure(cls: type[torch.optim.Optimizer], where: str) -> None:
    """Refuse an optimizer whose step needs a closure, such as LBFGS. Raises ConfigError."""
    step: Any = vars(cls).get("step", torch.optim.Optimizer.step)
    closure = inspect.signature(step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{where} is {cls.__name__}, which evaluates the loss several times a step by a closure, and the runner "
            "calls step() without one: choose another"
        )


def build_optimizer(
    name: str, parameters: Iterable[Any], *, lr: float | None = None, **arguments: Any
) -> torch.optim.Optimizer:
    """Return an optimizer by name; fused where its class and the parameters allow it (3 times faster on CPU too)."""
    if lr is not None:
        arguments["lr"] = lr
    cls: Any = optimizer_class(name, arguments)
    has_fused = "fused" in inspect.signature(cls).parameters
    parameters = list(parameters)
    for group in parameters:
        if isinstance(group, Mapping):  # torch would keep an unknown key and never look at it
            check_arguments(cls, {key: group[key] for key in group if key != "params"}, "optim.groups")
    if has_fused and not {"fused", "foreach", "differentiable"} & set(arguments):
        # a dtype or device may have no fused kernel; an argument that is wrong fails again below
        with contextlib.suppress(RuntimeError, ValueError, TypeError):
            return cls(parameters, fused=True, **arguments)
    try:
        return cls(parameters, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optim: {name} refuses its arguments: {error}") from error


def parameter_groups(
    model: nn.Module, groups: Sequence[Mapping[str, Any]], no_decay: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return a model's parameters sorted into groups by name.

    Args:
        model: without wrappers.
        groups: `{match: "bias|norm", weight_decay: 0.0}`: a regular expression that is searched for in a
            parameter's name, and the arguments that differ. The first match counts; what matches none has the
            general arguments.
        no_decay: words in the names of parameters, or of their modules' classes, in any letter case: what has one
            gets `weight_decay: 0`, in a group of its own beside that of the others.

    Raises:
        ConfigError: a group without `match`, or a group or word that matches no parameter.
    """
    for index, group in enumerate(groups):
        if not isinstance(group.get("match"), str):
            raise ConfigError(
                f"optim.groups[{index}] needs `match`, a regular expression for parameters' names"
            )
    sorted_parameters: list[list[torch.Tensor]] = [[] for _ in range(len(groups) + 1)]
    for name, parameter in model.named_parameters():
        hits = (index for index, group in enumerate(groups) if re.search(group["match"], name))
        sorted_parameters[next(hits, len(groups))].append(parameter)
    for index, group in enumerate(groups):
        if not sorted_parameters[index]:
            raise ConfigError(f"optim.groups[{index}]: no parameter's name matches {group['match']!r}")
    own = [{key: value for key, value in group.items() if key != "match"} for group in groups]
    exempt = _without_decay(model, no_decay)
    found = []
    for parameters, options in zip(sorted_parameters, [*own, {}], strict=True):
        for is_exempt, extra in ((False, {}), (True, {"weight_decay": 0.0})):
            part = [parameter for parameter in parameters if (id(parameter) in exempt) == is_exempt]
            if part:
                found.append({"params": part, **options, **extra})
    return found


def _without_decay(model: nn.Module, words: Sequence[str]) -> set[int]:
    """Return the ids of the parameters that a word names. Raises ConfigError for a word that names none."""
    found: set[int] = set()
    for word in words:
        named = {
            id(parameter)
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if word.lower() in name.lower() or word.lower() in type(module).__name__.lower()
        }
        named |= {id(p) for name, p in model.named_parameters() if word.lower() in name.lower()}
        if not named:
            raise ConfigError(
                f"optim.no_decay: {word!r} is in no parameter's name, and in no name of a module's class"
            )
        found |= named
    return found
