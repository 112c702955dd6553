"""From what a user wrote to a runner class and its full config."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic

from danling_core.callbacks import Callbacks, check_callback
from danling_core.config import Config, FreeParams
from danling_core.errors import ConfigError, DanLingError
from danling_core.optim.optimizers import optimizer_class
from danling_core.optim.schedulers import check_scheduler
from danling_core.runner.compiling import check_backend
from danling_core.runner.profiling import Profiler


def import_runner(target: str) -> type:
    """Return the runner's class; see `import_class`."""
    return import_class(target, "runner")


def import_class(target: str, key: str) -> type:
    """Return the class at `package.module:Class` or `path/to/file.py:Class`. Runs the user's code.

    Args:
        key: of the config, for messages.

    Raises:
        ConfigError: the module or the class is not there. An error inside the user's module is raised as it
            is.
    """
    module_name, _, class_name = target.rpartition(":")
    if not module_name or not class_name:
        raise ConfigError(
            f"{key} is {target!r}: write it as 'package.module:Class' or 'path/to/file.py:Class'"
        )
    is_file = module_name.endswith(".py")
    module = _import_file(module_name, key) if is_file else _import_module(module_name, target, key)
    found: Any = module
    for part in class_name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        classes = [
            n for n, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__
        ]
        raise ConfigError(
            f"{key} is {target!r}, but {module_name} has no class {class_name!r}; it has {classes}"
        )
    return found


def _import_module(name: str, target: str, key: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(
                f"{key} is {target!r}, but there is no module {error.name!r}: run from the folder that holds it, "
                "or install it"
            ) from error
        raise


def _import_file(name: str, key: str) -> Any:
    path = Path(name).resolve()
    if not path.is_file():
        raise ConfigError(f"{key} names the file {name!r}, and there is none at {path}")
    module_name = path.stem
    known = sys.modules.get(module_name)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(module_name, None)
        raise
    return module


def check_named(config: Config) -> None:
    """Refuse an optimizer, a schedule or a backend that torch does not have, and arguments that these do not take.

    Raises:
        ConfigError: names the nearest.
    """
    if config.optim is not None:
        optimizer_class(config.optim.name, config.optim.arguments())
    if config.scheduler is not None:
        check_scheduler(config.scheduler.name, config.scheduler.arguments())
    check_backend(config)


def callback_classes(config: Config) -> list[type]:
    """Return the classes of the callbacks that the config names, checked. Runs the user's code.

    Raises:
        ConfigError: one is not there, is no callback, or does not take the arguments that the config gives it.
    """
    found = []
    for number, callback in enumerate(config.callbacks):
        key = f"callbacks.{number}"
        cls = import_class(callback.name, key)
        check_callback(cls, key)
        try:
            inspect.signature(cls).bind(**callback.arguments())
        except TypeError as error:
            raise ConfigError(
                f"{key}: {cls.__name__} does not take what the config gives it: {error}"
            ) from None
        found.append(cls)
    return found


def make_callbacks(config: Config, work_dir: Callable[[], str]) -> Callbacks:
    """Make the profiler and the callbacks of a config. Raises ConfigError, also for what a constructor raises.

    Args:
        work_dir: returns the run's local folder, once it has one.
    """
    made: list[Any] = [] if config.profile is None else [Profiler(config.profile, work_dir)]
    for number, (cls, callback) in enumerate(zip(callback_classes(config), config.callbacks, strict=True)):
        try:
            made.append(cls(**callback.arguments()))
        except DanLingError:
            raise
        except Exception as error:
            raise ConfigError(
                f"callbacks.{number}: {cls.__name__} could not be made: {type(error).__name__}: {error}"
            ) from error
    return Callbacks(made)


def params_model(cls: type) -> Any:
    """Return the model that the annotation `params: MyParams` of a runner names; free where there is none.

    Raises:
        ConfigError: the annotation is not a subclass of `danling_core.Params` (or another pydantic model).
    """
    for base in cls.__mro__:
        annotation = base.__dict__.get("__annotations__", {}).get("params", Any)
        if annotation in (Any, "Any"):
            continue
        if isinstance(annotation, str):
            annotation = _evaluate(annotation, base)
        if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
            return annotation
        raise ConfigError(
            f"{base.__qualname__}.params is annotated {annotation!r}: name a subclass of danling_core.Params, "
            "defined at the top level of its module"
        )
    return FreeParams


def _evaluate(annotation: str, owner: type) -> Any:
    names: Any = {**vars(sys.modules[owner.__module__]), **vars(owner)}
    for part in annotation.split("."):
        names = names.get(part) if isinstance(names, dict) else getattr(names, part, None)
    return annotation if names is None else names


def resolve(cls: type, config: Any) -> tuple[Config, Any]:
    """Return the full config of a runner of this class, defaults of its params included, and the params as their
    model.

    Raises:
        ConfigError: a key or value that the config or the params refuse.
    """
    config = config if isinstance(config, Config) else Config.load(config)
    if config.runner is None:
        config = config.model_copy(update={"runner": f"{cls.__module__}:{cls.__qualname__}"})
    params = validate_params(params_model(cls), config.params)
    stated = config.params if isinstance(params, FreeParams) else params.model_dump()
    return config.model_copy(update={"params": stated}), params


def validate_params(model: Any, params: dict[str, Any]) -> Any:
    """Return the params section as `model`; raises ConfigError with one line per problem."""
    try:
        return model(**params)
    except pydantic.ValidationError as error:
        lines = [
            f"params.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False)
        ]
        raise ConfigError("\n".join(lines)) from error
