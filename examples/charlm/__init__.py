"""A small language model of characters, trained in step mode on the manual that Python carries."""

from .runner import CharLMRunner

__all__ = ["CharLMRunner"]
