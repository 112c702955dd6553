"""Turns pydantic's errors into one ConfigError that a user can act on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from danling_core.errors import ConfigError
from danling_core.secrets import shown
from danling_core.suggest import unknown_key

CLOSED = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, validate_default=False)
OPEN = ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True, validate_default=False)

_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text (put it in quotes)",
    "string_too_short": "text that is not empty",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "too_short": "{min_length} or more",
    "list_type": "a list",
    "tuple_type": "a list",
    "greater_than": "a number > {gt}",
    "greater_than_equal": "a number >= {ge}",
    "less_than": "a number < {lt}",
    "less_than_equal": "a number <= {le}",
    "literal_error": "{expected}",
}


class Model(BaseModel):
    """A frozen, closed model whose constructor raises ConfigError: one message, a line for each problem."""

    model_config = CLOSED
    SECTION: ClassVar[str] = ""  # where in a config this model's keys are

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self), self.SECTION)) from None


def explain(error: ValidationError, model: type[BaseModel], section: str = "") -> str:
    """One line `section.key: wanted .., found ..` for each problem; never the value of a secret."""
    lines = []
    for problem in error.errors(include_url=False):
        location = tuple(part for part in problem["loc"] if not isinstance(part, str) or part.strip())
        unknown = problem["type"] == "extra_forbidden"
        shown_at = [section, *location[: -1 if unknown else None]]  # an unknown key is named in its own line
        path = ".".join(str(part) for part in shown_at if part != "")
        text = _line(problem, location, _holder(model, location))
        lines.append(f"{path}: {text}" if path else text)
    return lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems:", *lines])


def labelled(label: str, error: ConfigError) -> ConfigError:
    """Return the same error, beginning with where it was found."""
    return type(error)(f"{label}: {error}")


def _line(problem: Any, location: Sequence[object], holder: type[BaseModel]) -> str:
    kind, context = problem["type"], problem.get("ctx") or {}
    if kind == "extra_forbidden":
        elsewhere = getattr(holder, "elsewhere", None)
        return unknown_key(
            str(location[-1]), holder.model_fields, elsewhere() if callable(elsewhere) else None
        )
    if kind == "missing":
        return "is missing"
    if kind in _WANTED:
        return f"wanted {_WANTED[kind].format(**context)}, found {shown(problem['input'], location)}"
    if kind == "value_error":
        return str(context.get("error", problem["msg"]))
    return str(problem["msg"])


def _holder(model: type[BaseModel], location: Sequence[object]) -> type[BaseModel]:
    """Return the model that holds the last key of `location`."""
    for key in location[:-1]:
        model = _section_of(model, str(key)) or model
    return model


def _section_of(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    field = model.model_fields.get(key)
    annotation: Any = getattr(model, "EXTRA", None) if field is None else field.annotation
    return next((one for one in _types_in(annotation) if issubclass(one, BaseModel)), None)


def _types_in(annotation: Any) -> Iterator[type]:
    """Yield the classes that a type is made of."""
    if isinstance(annotation, type):
        yield annotation
    for inner in get_args(annotation):
        yield from _types_in(inner)
