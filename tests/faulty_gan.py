"""The GAN of the examples, whose ranks die where a test asks."""

from __future__ import annotations

import json
import os
from typing import Any

from examples.gan.runner import GANRunner
from tests.faulty_runner import FAULT, FaultyRunner


class FaultyGAN(GANRunner):
    _is_due = FaultyRunner._is_due
    _fail = FaultyRunner._fail
    _wait_for_saves = FaultyRunner._wait_for_saves

    @property
    def _fault(self) -> dict[str, Any]:
        fault: dict[str, Any] = json.loads(os.environ.get(FAULT, "{}"))
        return fault

    def train_step(self, data: Any) -> Any:
        if self._fault:
            self.run_session.files.drain()
        self._fail("train")
        return super().train_step(data)

    def advance(self, loss: Any, optimizer: Any = None) -> None:
        super().advance(loss, optimizer)
        self._fail("between" if optimizer is self.critic_optimizer else "after")

    def evaluate_step(self, data: Any) -> Any:
        self._fail("evaluate")
        return super().evaluate_step(data)

    def emit(self, kind: str, **fields: Any) -> None:
        self._fail(kind)
        super().emit(kind, **fields)
