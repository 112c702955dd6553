"""The model card of an export: facts of the run, and how to load the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from danling_core.config import Config
from danling_core.errors import DanLingError
from danling_core.runs import metadata
from danling_core.runs.folder import RunFolder, Status

_LOAD = """from safetensors.torch import load_file

model.load_state_dict(load_file("model.safetensors"))"""
_PACKAGES = ("danling-flows", "torch", "numpy", "transformers")


def model_card(
    config: Config, folder: RunFolder | None, weights: str, parameters: int, pretrained: str | None = None
) -> str:
    """Return the card as Markdown, with the front matter that model hubs read.

    Args:
        config: of the run.
        folder: of the run, which says how it went; None where the checkpoint lies elsewhere.
        weights: where they come from.
        parameters: how many there are.
        pretrained: the model's class, where its `from_pretrained` reads the files.
    """
    status, known = (None, {}) if folder is None else (folder.find_status(), _metadata(folder))
    rows = {
        "weights": weights,
        "parameters": f"{parameters:,}",
        "runner": config.runner,
        **_of_status(status),
        **_of_metadata(known),
        "seed": config.seed,
    }
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items() if value is not None)
    name = status.name if status is not None else config.run_name
    results = _results(status)
    return f"""---
library_name: {"pytorch" if pretrained is None else "transformers"}
tags: [danling]
---

# {name}

| | |
|---|---|
{table}
{results}
## Load it

```python
{_LOAD if pretrained is None else f'model = {pretrained}.from_pretrained(".")'}
```

or, with the code of the run, `{_class_of(config)}.from_checkpoint(...)`. The run's config is in `config.yaml`:
`danling run config.yaml` trains it again.
"""


def _of_status(status: Status | None) -> dict[str, Any]:
    if status is None:
        return {}
    score = None
    if status.best_score is not None:
        score = f"{status.best_score:.6g} ({status.score_split} {status.score_name}, at {status.best_index})"
    return {
        "run": f"{status.name}, id {status.id}",
        "code": status.experiment_id or None,
        "trained": f"{status.epochs} epochs, {status.steps:,} steps, on {status.world_size} rank(s)",
        "best score": score,
        "bit for bit": "yes" if status.bitwise else f"no: {status.not_bitwise}",
    }


def _of_metadata(known: Mapping[str, Any]) -> dict[str, Any]:
    packages, git = known.get("packages") or {}, known.get("git") or {}
    versions = ", ".join(f"{name} {packages[name]}" for name in _PACKAGES if name in packages)
    commit = git.get("commit")
    return {
        "git": None if commit is None else f"{commit}{' (with changes)' if git.get('is_dirty') else ''}",
        "created": known.get("created_at"),
        "python": known.get("python"),
        "packages": versions or None,
    }


def _metadata(folder: RunFolder) -> dict[str, Any]:
    with contextlib.suppress(DanLingError):
        return metadata.read(folder.metadata_url)
    return {}


def _results(status: Status | None) -> str:
    result = status.evaluation if status is not None else None
    if not result:
        return ""
    lines = [
        f"| {split} | {', '.join(f'{name} {_cell(value)}' for name, value in values.items())} |"
        for split, values in result.items()
        if isinstance(values, Mapping)
    ]
    return "\n## Evaluation\n\n| split | |\n|---|---|\n" + "\n".join(lines) + "\n\n"


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _class_of(config: Config) -> str:
    return (config.runner or "Runner").rpartition(":")[2]
