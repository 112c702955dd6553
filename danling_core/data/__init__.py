"""Data for training and evaluation: exact samplers, loaders, and the resumable training stream."""

from danling_core.data.batches import batch_size_of, count_labels, to_device
from danling_core.data.loaders import build_evaluate_loader, build_train_loader
from danling_core.data.pass_loader import PassLoader
from danling_core.data.samplers import GlobalBatchSampler, ShardBatchSampler
from danling_core.data.stream import TrainStream, Window

__all__ = [
    "GlobalBatchSampler",
    "PassLoader",
    "ShardBatchSampler",
    "TrainStream",
    "Window",
    "batch_size_of",
    "build_evaluate_loader",
    "count_labels",
    "build_train_loader",
    "to_device",
]
