"""Metrics that count on the device: single ones, groups by name, and their states in checkpoints."""

from danling_core.metrics.group import Accuracy, Additive, MeanMeter, Metric, MetricGroup

__all__ = ["Accuracy", "Additive", "MeanMeter", "Metric", "MetricGroup"]
