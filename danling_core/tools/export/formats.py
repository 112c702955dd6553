"""Formats in which a whole model can be exported, with its code: torch.export, ONNX, TorchScript."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from danling_core.errors import ConfigError

Call = tuple[tuple[Any, ...], dict[str, Any]]
Run = Callable[..., Any]


def to_export(model: nn.Module, call: Call, path: Path) -> Run:
    """Write a program of `torch.export`; return it, loaded again."""
    arguments, named = call
    shapes = tuple(map(_free_batch, arguments)), {name: _free_batch(value) for name, value in named.items()}
    program = torch.export.export(model, arguments, named, dynamic_shapes=_by_parameter(model, *shapes))
    torch.export.save(program, path)
    loaded: Run = torch.export.load(path).module()
    return loaded


def to_onnx(model: nn.Module, call: Call, path: Path) -> Run | None:
    """Write an ONNX model; return it, loaded again, or None where there is no onnxruntime to run it."""
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "an .onnx file needs the extra `onnx`: pip install 'danling-flows[onnx]'"
        ) from error
    arguments, named = call
    shapes = tuple(map(_free_batch, arguments)), {name: _free_batch(value) for name, value in named.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own doings
        torch.onnx.export(
            model,
            arguments,
            path,
            kwargs=named,
            dynamo=True,
            external_data=False,
            verbose=False,
            dynamic_shapes=_by_parameter(model, *shapes),
        )
    return _run_onnx(path)


def _run_onnx(path: Path) -> Run | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*arguments: Any, **named: Any) -> Any:
        tensors = [*_tensors(arguments), *_tensors(named)]
        feed = dict(zip(names, tensors, strict=True))
        feed |= {name: value for name, value in named.items() if name in names}
        outputs = session.run(None, {name: tensor.numpy() for name, tensor in feed.items()})
        return [torch.from_numpy(output) for output in outputs]

    return run


def to_torchscript(model: nn.Module, call: Call, path: Path) -> Run:
    """Write a traced TorchScript module; return it, loaded again. A branch on data is as it went in the trace."""
    arguments, named = call
    all_named = dict(inspect.signature(model.forward).bind(*arguments, **named).arguments) if named else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.export is the successor
        traced = torch.jit.trace(
            model,
            None if named else arguments,
            example_kwarg_inputs=all_named,
            strict=False,
            check_trace=False,  # the outputs are compared here
        )
        traced.save(str(path))
        loaded: Run = torch.jit.load(str(path))
    return loaded


FORMATS: dict[str, Callable[[nn.Module, Call, Path], Run | None]] = {
    ".pt2": to_export,
    ".onnx": to_onnx,
    ".ts": to_torchscript,
}


@contextmanager
def noting_call(model: nn.Module, calls: list[Call]) -> Any:
    """Note the arguments of the model's first call inside the block."""

    def note(module: nn.Module, arguments: Any, named: Any) -> None:
        if not calls:
            calls.append((arguments, dict(named)))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def difference(model: nn.Module, exported: Run, call: Call) -> float:
    """Return the largest difference between the outputs of both, over the largest output. 0.0: the same bits."""
    arguments, named = call
    with torch.no_grad():
        ours, theirs = _tensors(model(*arguments, **named)), _tensors(exported(*arguments, **named))
    if len(ours) != len(theirs):
        raise ConfigError(f"the exported model returns {len(theirs)} tensors, the runner's {len(ours)}")
    found = 0.0
    for one, other in zip(ours, theirs, strict=True):
        if one.shape != other.shape:
            return math.inf
        if torch.equal(one, other) or not one.numel():
            continue
        one, other = one.double(), other.double()
        if not torch.equal(one.isfinite(), other.isfinite()):
            return math.inf
        one, other = one[one.isfinite()], other[other.isfinite()]
        if one.numel():
            found = max(found, float((one - other).abs().max()) / max(float(one.abs().max()), 1e-12))
    return found


def smaller(call: Call) -> Call:
    """Return the call with one sample less."""
    arguments, named = call
    return tuple(map(_less, arguments)), {name: _less(value) for name, value in named.items()}


def _less(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dim():
        return value[:-1]
    if isinstance(value, Mapping):
        return {key: _less(item) for key, item in value.items()}
    return type(value)(map(_less, value)) if isinstance(value, list | tuple) else value


def _free_batch(value: Any) -> Any:
    """Return the shape of an argument, with a first dimension that may be another."""
    if isinstance(value, torch.Tensor):
        return {0: torch.export.Dim.AUTO} if value.dim() else {}
    if isinstance(value, Mapping):
        return {key: _free_batch(item) for key, item in value.items()}
    return type(value)(map(_free_batch, value)) if isinstance(value, list | tuple) else None


def _by_parameter(model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Return the shapes by the names of the parameters of `forward`."""
    bound = inspect.signature(model.forward).bind(*arguments, **named)
    return dict(bound.arguments)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [each for item in value for each in _tensors(item)] if isinstance(value, list | tuple) else []
