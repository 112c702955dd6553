"""Summary of a runner's model: its modules, their shapes and parameters, and the memory that training will hold."""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from danling_core.config import Config
from danling_core.errors import ConfigError
from danling_core.runner.trainable import optimizer_of
from danling_core.tools.apart import runner_apart, without_log


@dataclass(frozen=True)
class Row:
    """One module: its place, class, shapes of one batch, and its own parameters, without those of modules inside."""

    name: str
    kind: str
    depth: int
    inputs: str
    output: str
    parameters: int
    trainable: int


@dataclass
class Summary:
    """Summary of a model.

    Args:
        rows: in the order of the model.
        parameters, trainable: counts; a shared parameter counts once.
        memory: bytes by what they are for: parameters, gradients, buffers, optimizer, average.
    """

    rows: list[Row] = field(default_factory=list)
    parameters: int = 0
    trainable: int = 0
    memory: dict[str, int] = field(default_factory=dict)


def summarise(file: str, overrides: Sequence[str] = ()) -> Summary:
    """Make the runner of a config in this process, pass one batch through its model, and say what it is made of.

    Nothing is trained, and nothing of it is kept.

    Raises:
        ConfigError: the config cannot be run, or there is no data.
    """
    stated = Config.load(file, overrides)
    if stated.runner is None:
        raise ConfigError(
            "runner is missing: name your class as 'package.module:Class' or 'path/to/file.py:Class'"
        )
    with tempfile.TemporaryDirectory(prefix="danling-") as folder, without_log():
        runner = runner_apart(stated, folder, ema_decay=None, average=None, compile=False)
        model = runner.model
        if not isinstance(model, nn.Module):
            raise ConfigError(f"{type(runner).__name__} sets no model: assign self.model in __init__")
        split = next(
            (name for name in runner.datasets | runner.dataloaders if name.startswith("train")), None
        )
        if split is None:
            raise ConfigError("the runner has no split to train on: there is no batch to show shapes of")
        shapes: dict[str, tuple[str, str]] = {}
        with _watching(model, shapes):
            next(runner.predictions(split), None)
        found = Summary([*_rows(model, shapes)])
        _count(found, model, runner.optimizer or optimizer_of(runner.config, model), stated)
        return found


def _rows(model: nn.Module, shapes: dict[str, tuple[str, str]]) -> Iterator[Row]:
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        inputs, output = shapes.get(name, ("", ""))
        yield Row(
            name or "(model)",
            type(module).__name__,
            name.count(".") + 1 if name else 0,
            inputs,
            output,
            sum(parameter.numel() for parameter in own),
            sum(parameter.numel() for parameter in own if parameter.requires_grad),
        )


def _count(found: Summary, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config) -> None:
    parameters = list(model.parameters())
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    found.parameters = sum(p.numel() for p in parameters)
    found.trainable = sum(p.numel() for p in parameters if p.requires_grad)
    found.memory = {
        "parameters": _bytes(parameters),
        "buffers": _bytes(model.buffers()),
        "gradients": _bytes(p for p in parameters if p.requires_grad),
        "optimizer": round(_bytes(trained) * _state_per_parameter(optimizer)),
        "average": 0 if config.averaging is None else _bytes([*parameters, *model.buffers()]),
    }


def _state_per_parameter(optimizer: torch.optim.Optimizer) -> float:
    """Return how much state an optimizer keeps for each number of a parameter: found by one step of a small one."""
    probe = nn.Parameter(torch.zeros(64, 64))
    known = inspect.signature(type(optimizer)).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in known}
    twin = type(optimizer)([probe], **options)
    probe.grad = torch.zeros_like(probe)
    twin.step()
    states = [value for value in twin.state[probe].values() if isinstance(value, torch.Tensor)]
    return sum(value.numel() for value in states if value.dim()) / probe.numel()


@contextlib.contextmanager
def _watching(model: nn.Module, shapes: dict[str, tuple[str, str]]) -> Iterator[None]:
    """Note the shapes of the first call of each module inside the block."""
    hooks = []
    for name, module in model.named_modules():

        def note(module: nn.Module, inputs: Any, named: Any, output: Any, name: str = name) -> None:
            shapes.setdefault(name, (_shape([*inputs, *named.values()]), _shape(output)))

        hooks.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return str(list(value.shape))
    if hasattr(value, "values"):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, map(_shape, value)))
    return ""


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
