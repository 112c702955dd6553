"""State dicts to bytes and back, by `torch.save` and `torch.load(weights_only=True)`: no file runs code."""

from __future__ import annotations

import errno
import os
import pickle
from typing import Any, BinaryIO, cast

import torch

from danling_core.checkpoints.record import Record
from danling_core.checkpoints.snapshot import compact
from danling_core.checkpoints.store import CheckpointStore
from danling_core.errors import CheckpointCorrupt, CheckpointError


def dump(state: Any, file: BinaryIO) -> None:
    """Write a state (nested dicts, lists and tuples of tensors and plain values) into an open binary file.

    NumPy values are converted, tensors come to the CPU, a storage shared by several is written once, and a
    view without the rest of its base.

    Raises:
        CheckpointError: the state has something that could not be loaded safely again, named by its path.
    """
    write(compact(state), file)


def write(plain_state: Any, file: BinaryIO) -> None:
    """Serialize as `dump` does, a state that is plain and compact already, such as a staged snapshot."""
    checked = torch.serialization.get_crc32_options()
    # The store has a better checksum of its own; torch's costs more than all the rest (817 against 243 ms
    # for 1 GB).
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(plain_state, file)
    finally:
        torch.serialization.set_crc32_options(checked)


def load(path: str, map_location: Any = "cpu") -> Any:
    """Read what `dump` (or `torch.save`, of tensors and plain values) wrote, and never run code from it.

    Raises:
        CheckpointCorrupt: the file is empty, cut short or not a checkpoint.
        CheckpointError: it is missing, or wants code to be run.
    """
    try:
        if os.path.getsize(path) == 0:
            raise CheckpointCorrupt(f"{path} is empty")
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it is not plain tensors and values, and reading it could run code. "
            f"Save a state_dict of tensors instead. ({_first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointCorrupt(f"{path} cannot be read as a checkpoint: {_first_line(error)}") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # torch seeks to where a cut file's index should be
            raise CheckpointCorrupt(f"{path} cannot be read as a checkpoint: it is cut short") from error
        raise CheckpointError(f"cannot read checkpoint {path}: {error}") from error


def load_state(store: CheckpointStore, record: Record, map_location: Any = "cpu") -> dict[str, Any]:
    """Return the verified state of a committed checkpoint, downloaded first where the store is remote.

    Raises:
        CheckpointCorrupt: it is not what was committed; `store.newest_good()` finds one that is.
    """
    path = store.open(record)
    try:
        state = load(path, map_location)
    finally:
        store.release(record)
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {record.name} holds a {type(state).__name__}, wanted a dict")
    return cast(dict[str, Any], state)


def _first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0][:300]
