"""Two small classifiers of 8x8 images: `(batch, 1, 8, 8)` to `(batch, 10)`."""

from __future__ import annotations

from torch import nn


def mlp(width: int, dropout: float) -> nn.Module:
    """One hidden layer of `width` units."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 10)
    )


def cnn(width: int, dropout: float) -> nn.Module:
    """Two convolutions, of `width` and `2 * width` channels; `width` is a multiple of 4.

    Normalised over groups of channels, so that the outcome depends on no rank's batch statistics.
    """
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.GroupNorm(4, width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.GroupNorm(4, 2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(2 * width * 16, 10),
    )
