"""Changes to a model before it is wrapped: it is compiled, and activations are computed again in backward passes."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from danling_core.config import Config
from danling_core.config.sections import CompileConfig
from danling_core.errors import ConfigError
from danling_core.suggest import nearest


def compiler(config: Config) -> Callable[[nn.Module], nn.Module]:
    """Return the function that compiles a model as the config says, or returns it as it is."""
    stated = config.compile
    if not stated:
        return lambda module: module
    options = stated.arguments() if isinstance(stated, CompileConfig) else {}
    names = stated.modules if isinstance(stated, CompileConfig) else []

    def compile(model: nn.Module) -> nn.Module:
        if not names:
            compiled: Any = torch.compile(model, **options)
            return compiled
        for module in named(model, names, "compile.modules"):
            if type(module).__module__.startswith("torch.nn."):
                module._compiled_call_impl = torch.compile(_call_of(module), **options)
            else:
                module.compile(**options)  # in its place; modules of one class share what is compiled
        return model

    return compile


def check_backend(config: Config) -> None:
    """Refuse a backend that torch does not have, before anything starts. Raises ConfigError."""
    if isinstance(config.compile, CompileConfig):
        known = torch.compiler.list_backends(exclude_tags=())
        backend = config.compile.backend
        if backend not in known:
            near = nearest(backend, known)
            hint = f"did you mean {near!r}?" if near else f"known are {', '.join(sorted(known))}"
            raise ConfigError(f"compile.backend is {backend!r}, which torch does not have: {hint}")


def recompute_activations(model: nn.Module, names: Sequence[str]) -> None:
    """Have these modules keep their inputs only, and compute what is inside again in the backward pass."""
    for module in named(model, names, "activation_checkpointing") if names else ():
        if not isinstance(vars(module).get("forward"), functools.partial):
            module.forward = functools.partial(_recomputed, module.forward)


def named(model: nn.Module, names: Sequence[str], key: str) -> list[nn.Module]:
    """Return the modules that patterns name: by their place in the model (`blocks.*`), or by their class.

    A module inside another one that is found by the same pattern is left out.

    Raises:
        ConfigError: a pattern names none.
    """
    places = {place: module for place, module in model.named_modules() if place}
    found: dict[str, nn.Module] = {}
    for name in names:
        own: list[str] = []
        for place, module in places.items():
            is_named = fnmatch.fnmatchcase(place, name) or type(module).__name__ == name
            if is_named and not any(place.startswith(f"{outer}.") for outer in own):
                own.append(place)
        if not own:
            near = nearest(name, [*places, *{type(module).__name__ for module in places.values()}])
            hint = f": did you mean {near!r}?" if near else ""
            raise ConfigError(
                f"{key}: {name!r} names no module of self.model, by its place or its class{hint}"
            )
        found |= {place: places[place] for place in own}
    return list(found.values())


def _call_of(module: nn.Module) -> Callable[..., Any]:
    """Return the call of a module of torch's own, which `module.compile()` would leave as it is.

    Each has a code object of its own: torch counts how often it compiles one, and gives up after a few.
    """

    def call(*inputs: Any, **named: Any) -> Any:
        return module._call_impl(*inputs, **named)

    call.__code__ = call.__code__.replace(co_name=f"call_{id(module)}")
    return call


def _recomputed(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, **named)
