"""Handwritten digits: an MLP and a CNN on 1797 images of 8x8 pixels."""

from .runner import CNNRunner, MLPRunner

__all__ = ["CNNRunner", "MLPRunner"]
