"""Export of a run's model for use without danling."""

from danling_core.tools.export.export import Exported, export

__all__ = ["Exported", "export"]
