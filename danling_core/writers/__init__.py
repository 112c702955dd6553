"""Writers: receivers of a run's events, which write them down for a person or another process.

A writer's own library (torch, TensorBoard, rich) is imported when it is made, not here.
"""

from __future__ import annotations

from danling_core.writers.events import EventLog
from danling_core.writers.progress_bar import ProgressBar
from danling_core.writers.protocol import TERMINAL, Event, Writer, Writers
from danling_core.writers.tensorboard import TensorBoardWriter
from danling_core.writers.text import LOGGER_NAME, TextLog

__all__ = [
    "LOGGER_NAME",
    "TERMINAL",
    "Event",
    "EventLog",
    "ProgressBar",
    "TensorBoardWriter",
    "TextLog",
    "Writer",
    "Writers",
]
