"""One iter of training, as the loop hands it to a step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """Weight and count of one forward and backward pass.

    The default stands for a batch outside of any loop: it counts fully, and ends its window.

    Args:
        weight: factor on the batch's mean loss, so that the gradient of the window is that of the mean over all its
            samples on all ranks. 0 for a batch that only keeps this rank in step with the others.
        count: samples of this rank in the batch; 0 where nothing is counted.
        ends_window: whether the optimizer steps after it.
        is_rehearsal: whether it leaves no trace: gradients of 0, nothing counted, no optimizer step.
    """

    weight: float = 1.0
    count: int = 1
    ends_window: bool = True
    is_rehearsal: bool = False


ALONE = Step()
REHEARSAL = Step(weight=0.0, count=0, is_rehearsal=True)
