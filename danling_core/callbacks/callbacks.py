"""The callbacks of one runner, called in order, with errors that say which one and when."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from danling_core.callbacks.callback import Callback
from danling_core.errors import CallbackError, ConfigError, DanLingError
from danling_core.suggest import nearest

logger = logging.getLogger("danling")

MOMENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class Callbacks:
    """All callbacks of a runner.

    Args:
        configured: those of the config, called first.
    """

    def __init__(self, configured: Iterable[Any] = ()) -> None:
        self._configured = list(configured)
        self._own: list[Any] = []
        self.at_step: list[Callable[[Any], None]] = []
        """What is called after every step: looked up once an epoch, since most have nothing to do there."""

    @property
    def own(self) -> list[Any]:
        """Return those that the runner sets, a list that may grow before training begins."""
        return self._own

    @own.setter
    def own(self, callbacks: Sequence[Any]) -> None:
        if isinstance(callbacks, str) or not isinstance(callbacks, Sequence):
            raise ConfigError(
                f"self.callbacks is a {type(callbacks).__name__}, wanted a list of danling_core.Callback"
            )
        self._own = list(callbacks)

    def __iter__(self) -> Iterator[Any]:
        return iter([*self._configured, *self._own])

    def __bool__(self) -> bool:
        return bool(self._configured or self._own)

    def check(self) -> None:
        """Refuse what is no callback. Raises ConfigError."""
        for callback in self._own:
            if isinstance(callback, type):
                raise ConfigError(
                    f"self.callbacks has the class {callback.__name__}: give it an instance, {callback.__name__}()"
                )
            check_callback(type(callback), "self.callbacks")

    def begin_epoch(self) -> None:
        """Look up what is to be called after every step."""
        self.at_step = [
            callback.on_step_end for callback in self if _overrides(type(callback), "on_step_end")
        ]

    def call(self, moment: str, runner: Any, *values: Any) -> None:
        """Call this moment of each, in order.

        Raises:
            CallbackError: what one raised, with its name and the moment. Errors of danling go on up as they are.
        """
        for callback in self:
            method = getattr(callback, moment, None)
            if method is not None:
                _call(method, runner, *values)

    def step_ended(self, runner: Any) -> None:
        """Call what is to be called after every step."""
        for method in self.at_step:
            _call(method, runner)

    @contextlib.contextmanager
    def fitting(self, runner: Any) -> Iterator[None]:
        """Call all at the beginning and the end of training, and tell them of what ends it early."""
        try:
            self.call("on_fit_start", runner)
            yield
            self.call("on_fit_end", runner)
        except BaseException as error:
            self._tell(runner, error)
            raise

    def _tell(self, runner: Any, error: BaseException) -> None:
        for callback in self:
            try:
                if hasattr(callback, "on_exception"):
                    callback.on_exception(runner, error)
            except Exception:
                logger.exception("besides, %s failed in on_exception", name_of(callback))

    # state --------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Return the states of those that have one, by class and position."""
        return {key: callback.state_dict() for key, callback in self._stateful()}

    def load_state_dict(self, states: dict[str, Any] | None) -> None:
        """Give each its state back; one that the checkpoint does not know begins anew, and that is said."""
        for key, callback in self._stateful():
            if states is not None and key in states:
                callback.load_state_dict(states[key])
            elif states is not None:
                logger.warning("the checkpoint has no state of the callback %s: it begins anew", key)

    def _stateful(self) -> list[tuple[str, Any]]:
        found = [(name_of(each), each) for each in self if hasattr(each, "state_dict")]
        names = [name for name, _ in found]
        return [(f"{name}.{names[:at].count(name)}", each) for at, (name, each) in enumerate(found)]


def check_callback(cls: type, where: str) -> None:
    """Refuse a class that has no moment, or one that nobody calls.

    Raises:
        ConfigError: names the class and what was probably meant.
    """
    methods = [name for name in dir(cls) if name.startswith("on_") and callable(getattr(cls, name))]
    if not any(name in MOMENTS for name in methods):
        raise ConfigError(
            f"{where}: {cls.__name__} has none of the moments of a danling_core.Callback: {', '.join(MOMENTS)}"
        )
    for name in methods:
        if name not in MOMENTS:
            near = nearest(name, MOMENTS)
            hint = f"did you mean {near}?" if near else f"known are {', '.join(MOMENTS)}"
            raise ConfigError(f"{where}: nobody calls {cls.__name__}.{name}: {hint}")
    if hasattr(cls, "state_dict") != hasattr(cls, "load_state_dict"):
        raise ConfigError(
            f"{where}: {cls.__name__} has only one of state_dict and load_state_dict: a checkpoint needs both"
        )


def name_of(callback: Any) -> str:
    """Return how messages and checkpoints call a callback: its class."""
    return type(callback).__qualname__


def _overrides(cls: type, moment: str) -> bool:
    return getattr(cls, moment, None) not in (None, getattr(Callback, moment))


def _call(method: Callable[..., None], runner: Any, *values: Any) -> None:
    try:
        method(runner, *values)
    except DanLingError:
        raise
    except Exception as error:
        where = f"{name_of(method.__self__)}.{method.__name__}"  # type: ignore[attr-defined]
        raise CallbackError(
            f"callback {where} (epoch {runner.epochs}, step {runner.steps}): {type(error).__name__}: {error}"
        ) from error
