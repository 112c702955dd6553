"""The text of Python's own manual (`pydoc_data.topics`), as a stream to train on and blocks to score."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

# Fixed, so that models and losses of different Python versions can be compared. All else is left out.
VOCABULARY = "\n" + "".join(chr(code) for code in range(32, 127))
VAL_SHARE = 0.1


def manual() -> str:
    """Return the manual's topics in alphabetical order, each paragraph only once, in the characters of `VOCABULARY`.

    Topics quote each other at length: with repeated paragraphs a model would be scored on what it was
    trained on.
    The text grows with Python's version: 0.37, 0.40 and 0.41 million characters in 3.11, 3.12 and 3.13.
    """
    text = "\n\n".join(topics[name] for name in sorted(topics))
    first = {" ".join(part.split()): part for part in reversed(re.split(r"\n\s*\n", text)) if part.strip()}
    kept = set(VOCABULARY)
    return "".join(character for character in "\n\n".join(reversed(first.values())) if character in kept)


def encoded(text: str) -> Tensor:
    """Indices into `VOCABULARY`: `(characters,)`, int64."""
    index = {character: number for number, character in enumerate(VOCABULARY)}
    return torch.tensor([index[character] for character in text])


def split() -> tuple[Tensor, Tensor]:
    """Return the text to train on, and after it in the manual the last tenth, to score."""
    text = encoded(manual())
    cut = round(len(text) * (1 - VAL_SHARE))
    return text[:cut], text[cut:]


class TextStream(IterableDataset[tuple[Tensor, Tensor]]):
    """Reads a text from front to back in blocks, shuffled on the way as streams are: through a buffer.

    Yields inputs and targets, both `(block,)`: a target is the character after its input. Each pass cuts the
    text at other places. Draws from torch's generator, which the loader seeds for each pass, equally on all
    ranks.

    Args:
        buffer: blocks held back, of which a random one goes out next.
    """

    def __init__(self, text: Tensor, block: int, buffer: int) -> None:
        self.text, self.block, self.buffer = text, block, buffer

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        held: list[int] = []
        begin = int(torch.randint(self.block, ()))
        for start in range(begin, len(self.text) - self.block, self.block):
            held.append(start)
            if len(held) > self.buffer:
                yield self._block(held, int(torch.randint(len(held), ())))
        for place in torch.randperm(len(held)).tolist():
            yield self._at(held[place])

    def _block(self, held: list[int], place: int) -> tuple[Tensor, Tensor]:
        held[place], held[-1] = held[-1], held[place]
        return self._at(held.pop())

    def _at(self, start: int) -> tuple[Tensor, Tensor]:
        stop = start + self.block
        return self.text[start:stop], self.text[start + 1 : stop + 1]


def blocks(text: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return the text as whole tensors `(blocks, block)`, inputs and targets, side by side without overlap."""
    count = (len(text) - 1) // block
    end = count * block
    return text[:end].view(count, block), text[1 : end + 1].view(count, block)
