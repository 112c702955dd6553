"""`danling keys`: every key of a config, with its default and meaning."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from danling_core.config import Config
from danling_core.config.sections import (
    AverageConfig,
    CompileConfig,
    DataLoaderConfig,
    OptimConfig,
    PretrainedConfig,
    ProfileConfig,
    SchedulerConfig,
)
from flows.exit_codes import BAD_INPUT, DONE

_SECTIONS: dict[str, type[BaseModel]] = {
    "dataloader": DataLoaderConfig,
    "optim": OptimConfig,
    "scheduler": SchedulerConfig,
    "average": AverageConfig,
    "pretrained": PretrainedConfig,
    "profile": ProfileConfig,
    "compile": CompileConfig,
}
_NOTES = (
    "dataloader.SPLIT.KEY\n    the same for one split: dataloader.val.batch_size",
    "optim.KEY, scheduler.KEY\n    any other argument of the class that `name` names",
)


def print_keys(text: str) -> int:
    """Print the keys in which `text` occurs; return 2 where there is none."""
    lines = [line for line in (*_lines(), *_NOTES) if text.lower() in line.lower()]
    print("\n".join(lines) or f"no key or meaning has {text!r} in it: `danling keys` lists all")
    return DONE if lines else BAD_INPUT


def _lines() -> Iterator[str]:
    for name, field in Config.model_fields.items():
        section = _SECTIONS.get(name)
        if section is None:
            yield _line(name, field.default, field.description)
            continue
        if not isinstance(field.default, BaseModel):
            yield _line(name, field.default, field.description)
        for key, inner in section.model_fields.items():
            yield _line(
                f"{name}.{key}", inner.default, inner.description, f"(required where {name} is given)"
            )


def _line(key: str, default: object, meaning: str | None, required: str = "(required)") -> str:
    shown = required if default is PydanticUndefined else "null" if default is None else repr(default)
    return f"{key} = {shown}\n    {meaning}"
