"""Configuration: the closed and frozen `Config`, its sections, overrides, sweeps and documents. Loads no torch."""

from danling_core.config.config import Config
from danling_core.config.sections import FreeParams, Params

__all__ = ["Config", "FreeParams", "Params"]
