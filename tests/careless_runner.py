"""A runner for tests that fails with a secret of the environment in its message."""

from __future__ import annotations

import os
from typing import Any

from tests.toy_runner import ToyParams, ToyRunner


class CarelessParams(ToyParams):
    is_careless: bool = False


class CarelessRunner(ToyRunner):
    params: CarelessParams

    def train_step(self, data: Any) -> Any:
        if self.params.is_careless and self.epochs == 1:
            secret = os.environ["AWS_SECRET_ACCESS_KEY"]
            raise ConnectionError(
                f"no answer from https://user:{secret}@store/bucket, the key being {secret}"
            )
        return super().train_step(data)
