"""Predictions of a run's model for a split, streamed to a file."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

import numpy as np
import torch

from danling_core import storage
from danling_core.errors import ConfigError
from danling_core.runner.loading import config_of
from danling_core.tools.apart import runner_apart

_NAME = "prediction"
_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def predict(
    checkpoint: str,
    split: str,
    file: str,
    overrides: Sequence[str] = (),
    *,
    watch: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> int:
    """Write a model's outputs for a split, in data set order, and return how many samples they are of.

    In this process, on one rank. Batches are written as they come; the file is there once all are.

    Args:
        checkpoint: a run's folder, or a checkpoint in it.
        file: .npy (one array), .safetensors or .parquet (several by name), local or at any URL.
        overrides: of the run's config, such as `limit_batches.test=10`.
        watch: passes the batches on, and shows how far it is.

    Raises:
        ConfigError: the split has no data, or the outputs do not fit the format.
    """
    kinds: dict[str, type[_Sink]] = {".npy": _Npy, ".safetensors": _Safetensors, ".parquet": _Parquet}
    suffix = PurePosixPath(file).suffix.lower()
    if suffix not in kinds:
        raise ConfigError(f"{file}: predictions are written as {', '.join(kinds)}")
    config = config_of(checkpoint).override(list(overrides))
    if storage.is_local(file):
        Path(storage.local_path(file)).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="danling-") as folder:
        runner = runner_apart(config, folder)
        runner.load_pretrained(checkpoint)
        sink = kinds[suffix](folder)
        count = 0
        for output in watch(runner.predictions(split)):
            named = _named(output)
            sink.write(named)
            count += len(next(iter(named.values())))
        if not count:
            raise ConfigError(f"split {split!r} has no sample: nothing is written")
        storage.put_file(sink.close(), file)
    return count


def _named(output: Any) -> dict[str, torch.Tensor]:
    """Return the outputs of a batch as tensors by name: `prediction` where there is one, else by key or position."""
    if isinstance(output, torch.Tensor):
        found = {_NAME: output}
    elif isinstance(output, Mapping):
        found = {str(name): each for name, each in output.items() if isinstance(each, torch.Tensor)}
    elif isinstance(output, tuple) and (names := getattr(output, "_fields", None)) is not None:
        pairs = zip(names, output, strict=True)
        found = {name: each for name, each in pairs if isinstance(each, torch.Tensor)}
    elif isinstance(output, (tuple, list)):
        found = {f"{_NAME}_{at}": each for at, each in enumerate(output) if isinstance(each, torch.Tensor)}
    else:
        found = {}
    found = {name: each.detach() for name, each in found.items() if each.dim()}
    if not found or len({len(each) for each in found.values()}) > 1:
        raise ConfigError(
            f"infer_step returned a {type(output).__name__}, wanted a tensor with a row for each sample, or several of "
            "them in a mapping or a tuple"
        )
    return found


class _Sink(Protocol):
    """File of predictions that grows."""

    def __init__(self, folder: str) -> None: ...

    def write(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Append the outputs of a batch."""

    def close(self) -> str:
        """Finish the file and return its path."""


class _Raw:
    """One output's rows, as bytes in a file; shape and type are told at the end."""

    def __init__(self, path: str, name: str, first: torch.Tensor) -> None:
        self.path = path
        self.dtype = first.dtype
        self.shape = first.shape[1:]
        self.rows = 0
        self._name = name
        self._file: IO[bytes] = open(path, "wb")  # noqa: SIM115 - until close

    def write(self, tensor: torch.Tensor) -> None:
        if tensor.dtype != self.dtype or tensor.shape[1:] != self.shape:
            raise ConfigError(
                f"{self._name!r} has rows of shape {tuple(tensor.shape[1:])} and {tensor.dtype} in one batch, "
                f"{tuple(self.shape)} and {self.dtype} in the first: pad them in infer_step"
            )
        self.rows += len(tensor)
        flat = tensor.contiguous().reshape(-1)
        self._file.write(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")

    def close(self) -> int:
        """Return the size in bytes."""
        self._file.close()
        return os.path.getsize(self.path)


class _Npy:
    """One array, with a row for each sample."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._raw: _Raw | None = None

    def write(self, batch: Mapping[str, torch.Tensor]) -> None:
        if len(batch) > 1:
            raise ConfigError(
                f"npy holds one array, and infer_step returns {', '.join(batch)}: use .safetensors or .parquet"
            )
        [(name, tensor)] = batch.items()
        tensor = tensor.float() if tensor.dtype is torch.bfloat16 else tensor  # which NumPy does not have
        self._raw = self._raw or _Raw(os.path.join(self._folder, "rows"), name, tensor)
        self._raw.write(tensor)

    def close(self) -> str:
        raw = self._raw
        assert raw is not None
        raw.close()
        path = os.path.join(self._folder, "array.npy")
        dtype = torch.empty(0, dtype=raw.dtype).numpy().dtype
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (raw.rows, *raw.shape),
        }
        with open(path, "wb") as file, open(raw.path, "rb") as rows:
            np.lib.format.write_array_header_1_0(file, header)
            shutil.copyfileobj(rows, file)
        return path


class _Safetensors:
    """Tensors by name. The format: the header's length, the header as JSON, the tensors' bytes one after the other."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._raw: dict[str, _Raw] = {}

    def write(self, batch: Mapping[str, torch.Tensor]) -> None:
        _check_names(self._raw, batch)
        for name, tensor in batch.items():
            if tensor.dtype not in _SAFETENSORS:
                raise ConfigError(f"safetensors holds no {tensor.dtype}, as {name!r} is")
            if name not in self._raw:
                self._raw[name] = _Raw(os.path.join(self._folder, f"rows-{len(self._raw)}"), name, tensor)
            self._raw[name].write(tensor)

    def close(self) -> str:
        header, offset = {}, 0
        for name, raw in self._raw.items():
            size = raw.close()
            header[name] = {
                "dtype": _SAFETENSORS[raw.dtype],
                "shape": [raw.rows, *raw.shape],
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path = os.path.join(self._folder, "tensors.safetensors")
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for raw in self._raw.values():
                with open(raw.path, "rb") as rows:
                    shutil.copyfileobj(rows, file)
        return path


class _Parquet:
    """A table with a row for each sample and a column for each output; one of several numbers is a list."""

    def __init__(self, folder: str) -> None:
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise ConfigError("parquet needs pyarrow: pip install 'danling-flows[parquet]'") from None
        self._path = os.path.join(folder, "table.parquet")
        self._writer: Any = None

    def write(self, batch: Mapping[str, torch.Tensor]) -> None:
        import pyarrow
        from pyarrow import parquet

        columns = {}
        for name, tensor in batch.items():
            array = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
            columns[name] = pyarrow.array(list(array.reshape(len(array), -1)) if array.ndim > 1 else array)
        table = pyarrow.table(columns)
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self._path, table.schema)
        elif table.schema != self._writer.schema:
            raise ConfigError(f"a batch has the columns {table.schema}, the first had {self._writer.schema}")
        self._writer.write_table(table)

    def close(self) -> str:
        self._writer.close()
        return self._path


def _check_names(known: Mapping[str, Any], batch: Mapping[str, Any]) -> None:
    if known and known.keys() != batch.keys():
        raise ConfigError(
            f"infer_step returned {', '.join(batch)} for one batch, and {', '.join(known)} before"
        )
