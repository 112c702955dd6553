"""Objects as files: tensors, arrays, tables, plain values, by the file's suffix, at any URL."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from danling_core import storage
from danling_core.config import documents
from danling_core.errors import ConfigError
from danling_core.storage.json_safe import from_json_safe

if TYPE_CHECKING:
    import torch

File = str | bytes | os.PathLike[str] | os.PathLike[bytes]
_TENSORS = (".pt", ".pth", ".bin", ".ckpt")
_YAML = (".yaml", ".yml")
_KNOWN = (*_TENSORS, ".safetensors", ".npy", ".csv", ".json", *_YAML)
_RUNS_CODE = (".pkl", ".pickle", ".joblib")


def location(file: File) -> str:
    """Return a path or URL as text, also where it is given as bytes."""
    return os.fsdecode(os.fspath(file))


def save_object(obj: Any, file: File) -> None:
    """Write an object in the format of the file's suffix. A reader never sees half of it.

    `.pt .pth .bin .ckpt`: tensors and plain values; `.safetensors`: tensors by name; `.npy`: one array or tensor;
    `.csv`: a list of rows or a mapping of columns; `.json`, `.yaml`: plain values.

    Raises:
        ConfigError: for an unknown suffix, and for an object that the format cannot hold.
    """
    url, suffix = location(file), _suffix(file)
    if storage.is_local(url):
        os.makedirs(os.path.dirname(storage.local_path(url)) or ".", exist_ok=True)
    if suffix == ".json":
        storage.write_json(url, obj)
    elif suffix in _YAML:
        storage.write_bytes(url, documents.dump_yaml(documents.plain(obj)).encode())
    elif suffix == ".csv":
        storage.write_bytes(url, _table(obj, url).encode())
    elif suffix == ".npy":
        storage.write_bytes(url, _npy(obj, url))
    elif suffix == ".safetensors":
        _put(url, lambda path: _write_safetensors(obj, path, url))
    else:
        _put(url, lambda path: _write_tensors(obj, path))


def load_object(file: File) -> Any:
    """Read what `save_object` wrote; code in it is never run. Raises ConfigError for an unknown suffix.

    A table is a list of rows, `{column: value}`, in which what reads as a number is one.
    """
    url, suffix = location(file), _suffix(file)
    if suffix == ".json":
        return from_json_safe(storage.read_json(url))
    if suffix in _YAML:
        return documents.parse_yaml(documents.read_text(url), url)
    if suffix == ".csv":
        rows = csv.DictReader(io.StringIO(documents.read_text(url), newline=""))
        return [{name: _number(value) for name, value in row.items()} for row in rows]
    if suffix == ".npy":
        import numpy as np

        return np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False)
    return load_tensors(url)


def load_tensors(url: str) -> Any:
    """Read tensors and plain values from a file, downloaded first where it is remote. Code in it is refused."""
    from danling_core.checkpoints import codec

    read = _read_safetensors if url.lower().endswith(".safetensors") else codec.load
    if storage.is_local(url):
        return read(storage.local_path(url))
    with tempfile.TemporaryDirectory(prefix="danling-") as folder:
        path = os.path.join(folder, "state.pt")
        storage.get_file(url, path)
        return read(path)


def _put(url: str, write: Callable[[str], None]) -> None:
    """Write a file beside it first, so that a reader never sees half of one."""
    with tempfile.TemporaryDirectory(prefix="danling-") as folder:
        path = os.path.join(folder, "state")
        write(path)
        storage.put_file(path, url)


def _write_tensors(obj: Any, path: str) -> None:
    from danling_core.checkpoints import codec

    with open(path, "wb") as file:
        codec.dump(obj, file)


def _write_safetensors(obj: Any, path: str, url: str) -> None:
    import torch
    from safetensors.torch import save_file

    if not isinstance(obj, Mapping) or not all(isinstance(each, torch.Tensor) for each in obj.values()):
        raise ConfigError(f"{url}: safetensors holds a mapping of names to tensors, not a {_kind(obj)}")
    save_file({str(name): each.detach().cpu().contiguous().clone() for name, each in obj.items()}, path)


def _read_safetensors(path: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path} is no safetensors file: {error}") from error


def _npy(obj: Any, url: str) -> bytes:
    import numpy as np

    try:
        array = np.asarray(obj.detach().cpu() if hasattr(obj, "detach") else obj)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{url}: npy holds one array of numbers: {error}") from error
    if array.dtype.hasobject:
        raise ConfigError(f"{url}: npy holds one array of numbers, not a {_kind(obj)} of objects")
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _table(obj: Any, url: str) -> str:
    if isinstance(obj, Mapping):
        columns = {str(name): list(_plain(values)) for name, values in obj.items()}
        if len({len(values) for values in columns.values()}) > 1:
            raise ConfigError(f"{url}: the columns of a table are equally long")
        names = list(columns)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    elif isinstance(obj, Sequence) and all(isinstance(row, Mapping) for row in obj):
        rows = [{str(name): _plain(value) for name, value in row.items()} for row in obj]
        names = list(dict.fromkeys(name for row in rows for name in row))
    else:
        raise ConfigError(f"{url}: csv holds a list of rows or a mapping of columns, not a {_kind(obj)}")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _number(text: Any) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):
            continue
    return text


def _kind(obj: Any) -> str:
    return type(obj).__name__


def _suffix(file: File) -> str:
    suffix = PurePosixPath(location(file)).suffix.lower()
    if suffix in _RUNS_CODE:
        raise ConfigError(
            f"{location(file)}: a pickle runs code when it is loaded: use .pt for tensors and plain values, .json or "
            ".yaml for plain values"
        )
    if suffix not in _KNOWN:
        raise ConfigError(
            f"{location(file)}: how is {suffix or 'a file without a suffix'} written? Known: {', '.join(_KNOWN)}"
        )
    return suffix
