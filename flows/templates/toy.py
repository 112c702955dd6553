"""A runner small enough to read in a minute: a line through noisy points."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

import danling_core as dl


class ToyRunner(dl.TorchRunner):
    def __init__(self, config):
        super().__init__(config)
        inputs = torch.linspace(-1, 1, 200).unsqueeze(1)
        targets = 3 * inputs + 0.1 * torch.randn(200, 1)
        self.datasets["train"] = TensorDataset(inputs[::2], targets[::2])
        self.datasets["val"] = TensorDataset(inputs[1::2], targets[1::2])
        self.model = nn.Linear(1, 1)
        self.criterion = nn.MSELoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.params.lr)
