"""The modules of a run, where their owner holds them: placed, wrapped, trained, evaluated and compared together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from danling_core.errors import ConfigError, RanksDiffer
from danling_core.parallel.strategies import SingleRank, unwrap


@dataclass(frozen=True)
class Slot:
    """A place that holds a module, such as an attribute of a runner.

    Args:
        get: returns what is there.
        put: puts something else there; None where that cannot be done, as in a tuple.
    """

    get: Callable[[], Any]
    put: Callable[[Any], None] | None


class Modules:
    """The modules by the names of their places.

    Args:
        strategy: how a module lies on the ranks.
    """

    def __init__(self, strategy: SingleRank) -> None:
        self._strategy = strategy
        self._slots: dict[str, Slot] = {}
        self._aside: dict[str, Any] = {}
        """The wrapped modules, while an evaluation has others in their places."""
        self._kept_in_eval: set[int] = set()
        self._trainable: dict[str, list[str]] = {}
        """What required gradients when the modules were wrapped."""
        self._frozen: dict[str, list[str]] | None = None
        """What `frozen` returned before an evaluation put everything into eval mode."""

    def add(self, name: str, slot: Slot) -> None:
        """Take note of a place; the module may come later, and may be another one."""
        self._slots[name] = slot

    @property
    def wrapped(self) -> dict[str, nn.Module]:
        """Return what the training step calls, by name."""
        found = {name: self._aside.get(name, slot.get()) for name, slot in self._slots.items()}
        return {name: module for name, module in found.items() if isinstance(module, nn.Module)}

    @property
    def own(self) -> dict[str, nn.Module]:
        """Return the user's modules, without wrappers, by name."""
        return {name: unwrap(module) for name, module in self.wrapped.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters as `model.layer.weight`; a shared one by its first name."""
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for place, module in self.own.items():
            for name, parameter in module.named_parameters():
                found.setdefault(id(parameter), (f"{place}.{name}", parameter))
        return dict(found.values())

    def put(self, name: str, module: nn.Module) -> None:
        """Put a module into its place. Raises ConfigError where that cannot be done."""
        put = self._slots[name].put
        if put is None:
            raise ConfigError(
                f"self.{name} stands in a tuple, where it cannot be replaced: use a list, or an attribute"
            )
        put(module)

    # placing ------------------------------------------------------------------------------------------------
    def place(self, device: torch.device, **memory: Any) -> None:
        """Move all modules to the device, and make them equal on all ranks. Collective.

        Args:
            memory: options of `to` for the one called `model`.
        """
        for name, module in self.own.items():
            moved = module.to(device, **(memory if name == "model" else {}))
            if moved is not module:
                self.put(name, moved)
        self._kept_in_eval = {id(part) for module in self.own.values() for part in _in_eval(module)}
        self.equalize()

    def equalize(self) -> None:
        """Give all ranks the weights and buffers of rank 0. Collective."""
        self._strategy.equalize(list(self.own.values()))

    def wrap(self, trained: Iterable[nn.Parameter], compile: Callable[[nn.Module], nn.Module]) -> None:
        """Wrap `model`, and each module that has parameters among `trained`, for the training step. Collective.

        Args:
            compile: compiles `model`, or returns it as it is.

        Raises:
            ConfigError: a module among them is never called as a whole.
        """
        ids = {id(parameter) for parameter in trained}
        names = [n for n, m in self.own.items() if n == "model" or any(id(p) in ids for p in m.parameters())]
        for name in names:
            module = self.own[name]
            wrapped = self._strategy.wrap(
                compile(module) if name == "model" else module, is_only=len(names) == 1
            )
            if isinstance(wrapped, DistributedDataParallel) and _has_no_forward(module):
                raise ConfigError(
                    f"self.{name} is a {type(module).__name__}, which has no forward of its own, so that its gradients "
                    "would not be reduced over the ranks: make it a part of self.model, or give it a forward"
                )
            if wrapped is not self.wrapped[name]:
                self.put(name, wrapped)
        self._trainable = self.trainable()

    def trainable(self) -> dict[str, list[str]]:
        """Return the names of the parameters that require gradients, by module."""
        return {n: [k for k, p in m.named_parameters() if p.requires_grad] for n, m in self.own.items()}

    def frozen(self) -> dict[str, list[str]]:
        """Return the names of the parts that stay in eval mode while their module is trained, by module."""
        if self._frozen is not None:
            return self._frozen
        return {
            name: [
                key for key, part in module.named_modules() if key and module.training and not part.training
            ]
            for name, module in self.own.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return which parameters require gradients, and which parts stay in eval mode: training may change both."""
        return {"trainable": self.trainable(), "frozen": self.frozen()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Iterable[str]]]) -> None:
        """Take over what `state_dict` returned, of the modules that are here."""
        for name, module in self.own.items():
            trainable, frozen = (set(state[kind].get(name, ())) for kind in ("trainable", "frozen"))
            for key, parameter in module.named_parameters() if name in state["trainable"] else ():
                if parameter.requires_grad != (key in trainable):
                    parameter.requires_grad_(key in trainable)
            for key, part in module.named_modules():
                if key in frozen:
                    part.train(False)
                    self._kept_in_eval.add(id(part))

    def what_changed(self) -> list[str]:
        """Return the parameters whose `requires_grad` has changed since they were wrapped."""
        now = self.trainable()
        return [
            f"{name}.{key}"
            for name in now
            for key in sorted({*now[name]} ^ {*self._trainable.get(name, now[name])})
        ]

    # training and evaluating --------------------------------------------------------------------------------
    def train(self) -> None:
        """Put the modules into training mode, but for the parts that the user put into `eval()` beforehand."""
        own = self.own
        for name, module in self.wrapped.items():
            if not (module.training and own[name].training):
                module.train()
                for part in module.modules():
                    if id(part) in self._kept_in_eval:
                        part.train(False)

    @contextlib.contextmanager
    def evaluating(self, averaged: nn.Module | None) -> Iterator[None]:
        """Have the user's modules, in eval mode and without gradients, in their places inside the block. Collective.

        Args:
            averaged: takes the place of `model`, where there is one.
        """
        own, aside = self.own, self.wrapped
        modules = [*own.values(), *([] if averaged is None else [averaged])]
        modes = [(part, part.training) for module in modules for part in module.modules()]
        self._frozen = self.frozen()
        shown = own if averaged is None else {**own, "model": averaged}
        try:
            with self._strategy.same_buffers(modules), torch.no_grad():
                self._aside = aside
                for name, module in shown.items():
                    if module is not aside[name]:
                        self.put(name, module)
                    module.eval()
                yield
        finally:
            for name, module in aside.items():
                if module is not self._slots[name].get():
                    self.put(name, module)
            self._aside, self._frozen = {}, None
            for part, was_training in modes:
                part.training = was_training

    def no_sync(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context whose backward passes leave the gradients unreduced."""
        return self._strategy.no_sync(list(self.wrapped.values()))

    # comparing ----------------------------------------------------------------------------------------------
    def check_equal(self, step: int) -> None:
        """Compare the weights of all ranks. Collective; cheap beside a save.

        Raises:
            RanksDiffer: names the first parameter that is not the same on all ranks.
        """
        name = self._strategy.first_difference(self.parameters())
        if name is not None:
            raise RanksDiffer(
                f"parameter {name!r} differs between the ranks after step {step}: its gradient is not reduced. Let the "
                "loss come from self.model(...) as a whole, not from a part of it or from self.unwrap(self.model), and "
                "change weights in the same way on all ranks. Nothing is saved"
            )


def _in_eval(module: nn.Module) -> list[nn.Module]:
    """Return the parts in eval mode of a module that is in training mode; a whole module in eval mode says nothing."""
    return [part for part in module.modules() if not part.training] if module.training else []


def _has_no_forward(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward
