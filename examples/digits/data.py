"""scikit-learn's digits as three stratified splits of whole tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

TEST_SIZE, VAL_SIZE = 360, 216  # of 1797; 1221 are left to train on
SPLIT_SEED = 0  # fixed: every run of every experiment is scored on the same digits


class Digits(Dataset[tuple[Tensor, Tensor]]):
    """A split held in two tensors: images `(n, 1, 8, 8)` in [0, 1] and labels `(n,)`.

    One indexing operation fetches a batch (`__getitems__`). `max_shift` moves each image of a batch by up
    to so many pixels in each direction, drawn from torch's generator, which is seeded per rank.
    """

    def __init__(self, images: Tensor, labels: Tensor, max_shift: int = 0) -> None:
        self.images, self.labels, self.max_shift = images, labels, max_shift

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Whole batch: images `(batch, 1, 8, 8)` and labels `(batch,)`."""
        chosen = torch.as_tensor(indices)
        images = self.images[chosen]
        return shifted(images, self.max_shift) if self.max_shift else images, self.labels[chosen]


def shifted(images: Tensor, max_shift: int) -> Tensor:
    """Move each image `(batch, 1, height, width)` by its own random offset; the border brings in zeros."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (max_shift,) * 4)
    offsets = torch.randint(0, 2 * max_shift + 1, (2, batch, 1))
    rows = (offsets[0] + torch.arange(height))[:, :, None]
    columns = (offsets[1] + torch.arange(width))[:, None, :]
    return padded[torch.arange(batch)[:, None, None], 0, rows, columns].unsqueeze(1)


def digits(max_shift: int = 0) -> dict[str, Digits]:
    """Return the splits train, val and test (1221, 216, 360); only train is shifted."""
    pixels, targets = load_digits(return_X_y=True)
    rest, test, rest_targets, test_targets = train_test_split(
        pixels, targets, test_size=TEST_SIZE, stratify=targets, random_state=SPLIT_SEED
    )
    train, val, train_targets, val_targets = train_test_split(
        rest, rest_targets, test_size=VAL_SIZE, stratify=rest_targets, random_state=SPLIT_SEED
    )

    def split(pixels: object, targets: object, max_shift: int = 0) -> Digits:
        images = torch.as_tensor(pixels, dtype=torch.float32).div(16).view(-1, 1, 8, 8)
        return Digits(images, torch.as_tensor(targets, dtype=torch.long), max_shift)

    return {
        "train": split(train, train_targets, max_shift),
        "val": split(val, val_targets),
        "test": split(test, test_targets),
    }
