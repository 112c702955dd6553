"""Writes docs/schedules.svg: the schedules of docs/training.md, each as it is built from the line of YAML above it."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import yaml

from danling_core.config.sections import SchedulerConfig
from danling_core.optim.schedulers import build_scheduler
from flows.curves import chart_group

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "training.md"
PICTURE = ROOT / "docs" / "schedules.svg"
_STEPS, _RATE = 1000, 0.01


def stated() -> list[str]:
    """Return the schedules of the page, in its order."""
    return re.findall(r"^scheduler: (\{.*?\})", PAGE.read_text(), flags=re.M)


def rates(text: str) -> list[tuple[float, float]]:
    """Return the learning rate at each step of a training of 1000 steps."""
    section = SchedulerConfig(**yaml.safe_load(text))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=_RATE)
    scheduler = build_scheduler(
        section.name,
        optimizer,
        total_steps=_STEPS,
        warmup_steps=section.warmup_steps,
        **section.arguments(),
    )
    found = []
    for step in range(_STEPS):
        found.append((float(step), float(optimizer.param_groups[0]["lr"])))
        optimizer.step()
        if step < _STEPS - 1:
            scheduler.step()
    return found[::10] + found[-1:]


def picture() -> str:
    """Return the picture: a chart for each schedule."""
    charts = {text: {"lr": rates(text)} for text in stated()}
    return chart_group(charts) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture())
