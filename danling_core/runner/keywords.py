"""Batches that are the keywords of a model's call, as in Hugging Face's `transformers`: `model(**batch)`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from danling_core.errors import ConfigError
from danling_core.parallel.strategies import unwrap

_TARGETS = ("labels", "label", "target")
_PREDICTIONS = ("logits", "prediction", "last_hidden_state")


def are_keywords(data: Any) -> bool:
    """Return whether a batch is a mapping without an `input`."""
    return isinstance(data, Mapping) and "input" not in data


def forward(model: Any, criterion: Any, data: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return prediction, target and loss of `model(**data)`; None for what there is not.

    The prediction is the output's `logits`, the target the batch's `labels`. The loss is the criterion's where there
    is one and a target, else the one in the output.

    Raises:
        ConfigError: the model does not take these keywords.
    """
    kind: Any = type(unwrap(model))
    _check(kind, tuple(map(str, data)))
    output = model(**data)
    target = next((data[name] for name in _TARGETS if name in data), None)
    prediction = next(
        (found for name in _PREDICTIONS if (found := part_of(output, name)) is not None), output
    )
    if criterion is not None and target is not None:
        return prediction, target, criterion(prediction, target)
    return prediction, target, part_of(output, "loss")


def inputs_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch without its targets, for inference."""
    return {str(name): value for name, value in data.items() if name not in _TARGETS}


def part_of(output: Any, name: str) -> Any:
    """Return a part of a model's output, an attribute or an item; None where it has none."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


@functools.cache
def _check(model: type[nn.Module], names: tuple[str, ...]) -> None:
    try:
        inspect.signature(model.forward).bind(None, **dict.fromkeys(names))
    except TypeError as error:
        raise ConfigError(
            f"a batch is a mapping of {sorted(names)}, and {model.__name__}.forward does not take these as keywords "
            f"({error}): return (input, target), a mapping with 'input' and 'target', or what the model's call names, "
            "or override train_step and evaluate_step"
        ) from None
