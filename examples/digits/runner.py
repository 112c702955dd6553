"""The runners of the digits: data, model, criterion and optimizer; everything else has a default."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

import danling_core as dl
from danling_core.metrics import Accuracy, MetricGroup

from .data import digits
from .models import cnn, mlp


class MLPParams(dl.Params):
    """Hyperparameters of the MLP."""

    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    width: int = Field(128, ge=1, description="hidden units")
    dropout: float = Field(0.1, ge=0, lt=1)


class CNNParams(dl.Params):
    """Hyperparameters of the CNN."""

    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    width: int = Field(32, ge=4, multiple_of=4, description="channels of the first convolution")
    dropout: float = Field(0.1, ge=0, lt=1)
    max_shift: int = Field(1, ge=0, le=3, description="training images move by up to so many pixels")


class MLPRunner(dl.TorchRunner):
    """One hidden layer on the pixels as they are."""

    params: MLPParams

    def __init__(self, config: dl.Config) -> None:
        super().__init__(config)
        self.datasets.update(digits())
        self.model = mlp(self.params.width, self.params.dropout)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.params.lr)
        self.metrics = MetricGroup(accuracy=Accuracy())


class CNNRunner(dl.TorchRunner):
    """Two convolutions on images that are shifted at random while training."""

    params: CNNParams

    def __init__(self, config: dl.Config) -> None:
        super().__init__(config)
        self.datasets.update(digits(self.params.max_shift))
        self.model = cnn(self.params.width, self.params.dropout)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.params.lr)
        self.metrics = MetricGroup(accuracy=Accuracy())
