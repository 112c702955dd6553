"""The canonical form of a config: what its identity hashes, the same however it was written."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from danling_core.config.sections import OptimConfig, SchedulerConfig


def canonical(section: BaseModel) -> dict[str, Any]:
    """Identity fields that differ from their default, as plain values.

    A field added later with a default that means "as before" changes nothing here. Free keys are kept whole.
    """
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        if is_identity(field):
            value = _value(getattr(section, name))
            if value != _default(field):
                found[name] = value
    for name, value in (section.__pydantic_extra__ or {}).items():
        value = _value(value)
        if value != {}:
            found[name] = (
                _numbers_as_floats(value) if isinstance(section, (OptimConfig, SchedulerConfig)) else value
            )
    if isinstance(section, (OptimConfig, SchedulerConfig)):
        found["name"] = section.name.lower()  # classes are found by name in any letter case
    return found


def is_identity(field: FieldInfo) -> bool:
    """Return whether a field can change a result, and so is part of the run's identity."""
    extra = field.json_schema_extra
    return not (isinstance(extra, dict) and extra.get("identity") is False)


def _value(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_value(item) for item in value]
    return canonical(value) if isinstance(value, BaseModel) else value


def _default(field: FieldInfo) -> Any:
    return _value(field.get_default(call_default_factory=True, validated_data={}))


def _numbers_as_floats(value: Any) -> Any:
    """Make numbers floats: arguments of a torch class have no declared types, and 0 is meant like 0.0."""
    if isinstance(value, dict):
        return {key: _numbers_as_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers_as_floats(item) for item in value]
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= 2**53 else value  # larger ones would not stay exact
