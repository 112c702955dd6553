"""Two networks trained against each other: `advance` is called once for each optimizer."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import nn

import danling_core as dl
from examples.digits.data import digits


class GANParams(dl.Params):
    """Hyperparameters of both networks."""

    lr: float = Field(1e-3, gt=0, description="learning rate of the generator")
    critic_lr: float = Field(1e-3, gt=0, description="learning rate of the critic")
    width: int = Field(64, ge=1, description="hidden units of each")
    noise: int = Field(16, ge=1, description="numbers that an image is made of")


class GANRunner(dl.TorchRunner):
    """Generates images of digits (arXiv 1406.2661), with the loss that does not saturate.

    The score is how far the mean and the spread of generated pixels are from those of real ones.
    """

    params: GANParams

    def __init__(self, config: dl.Config) -> None:
        super().__init__(config)
        self.datasets.update(digits())
        width, noise = self.params.width, self.params.noise
        self.model = nn.Sequential(nn.Linear(noise, width), nn.ReLU(), nn.Linear(width, 64), nn.Sigmoid())
        self.critic = nn.Sequential(nn.Linear(64, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))
        self.criterion = nn.BCEWithLogitsLoss()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.params.lr, betas=(0.5, 0.999))
        self.critic_optimizer = torch.optim.Adam(
            self.critic.parameters(), lr=self.params.critic_lr, betas=(0.5, 0.999)
        )

    def train_step(self, data: Any) -> tuple[torch.Tensor, torch.Tensor]:
        real = data[0].flatten(1)
        with self.autocast():
            made = self.model(self.noise(len(real)))
            critic_loss = self.judged(real, 1.0) + self.judged(made.detach(), 0.0)
        self.advance(critic_loss, self.critic_optimizer)
        with self.autocast():
            loss = self.judged(made, 1.0)
        self.advance(loss, self.optimizer)
        return made, loss

    def evaluate_step(self, data: Any) -> tuple[torch.Tensor, torch.Tensor]:
        real = data[0].flatten(1)
        generator = torch.Generator().manual_seed(self.seed)  # the same images every time
        made = self.model(torch.randn(256, self.params.noise, generator=generator).to(self.device))
        distance = (made.mean(0) - real.mean(0)).square().mean() + (made.std() - real.std()).square()
        return made, distance

    def judged(self, images: torch.Tensor, truth: float) -> torch.Tensor:
        """Return the critic's loss on images that are real (1) or made (0)."""
        verdict = self.critic(images)
        return self.criterion(verdict, torch.full_like(verdict, truth))

    def noise(self, count: int) -> torch.Tensor:
        """Return what `count` images are made of: `(count, noise)`."""
        return torch.randn(count, self.params.noise).to(self.device)
