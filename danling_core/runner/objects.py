"""Objects as files: tensors and plain values, JSON and YAML, by the file's suffix, at any URL."""

from __future__ import annotations

import os
import tempfile
from pathlib import PurePosixPath
from typing import Any

from danling_core import storage
from danling_core.config import documents
from danling_core.errors import ConfigError
from danling_core.storage.json_safe import from_json_safe

File = str | bytes | os.PathLike[str] | os.PathLike[bytes]
_TENSORS = (".pt", ".pth", ".bin", ".ckpt")
_YAML = (".yaml", ".yml")
_KNOWN = ", ".join([*_TENSORS, ".json", *_YAML])


def location(file: File) -> str:
    """Return a path or URL as text, also where it is given as bytes."""
    return os.fsdecode(os.fspath(file))


def save_object(obj: Any, file: File) -> None:
    """Write an object in the format of the file's suffix. Raises ConfigError for an unknown suffix."""
    url, suffix = location(file), _suffix(file)
    if storage.is_local(url):
        os.makedirs(os.path.dirname(storage.local_path(url)) or ".", exist_ok=True)
    if suffix == ".json":
        storage.write_json(url, obj)
    elif suffix in _YAML:
        storage.write_bytes(url, documents.dump_yaml(documents.plain(obj)).encode())
    else:
        _save_tensors(obj, url)


def load_object(file: File) -> Any:
    """Read what `save_object` wrote; code in it is never run. Raises ConfigError for an unknown suffix."""
    url, suffix = location(file), _suffix(file)
    if suffix == ".json":
        return from_json_safe(storage.read_json(url))
    if suffix in _YAML:
        return documents.parse_yaml(documents.read_text(url), url)
    return load_tensors(url)


def load_tensors(url: str) -> Any:
    """Read tensors and plain values from a file, downloaded first where it is remote. Code in it is refused."""
    from danling_core.checkpoints import codec

    if storage.is_local(url):
        return codec.load(storage.local_path(url))
    with tempfile.TemporaryDirectory(prefix="danling-") as folder:
        path = os.path.join(folder, "state.pt")
        storage.get_file(url, path)
        return codec.load(path)


def _save_tensors(obj: Any, url: str) -> None:
    """Write a file beside it first, so that a reader never sees half of one."""
    from danling_core.checkpoints import codec

    with tempfile.TemporaryDirectory(prefix="danling-") as folder:
        path = os.path.join(folder, "state.pt")
        with open(path, "wb") as file:
            codec.dump(obj, file)
        storage.put_file(path, url)


def _suffix(file: File) -> str:
    suffix = PurePosixPath(location(file)).suffix.lower()
    if suffix not in (*_TENSORS, ".json", *_YAML):
        raise ConfigError(
            f"{location(file)}: how is {suffix or 'a file without a suffix'} written? Known: {_KNOWN}"
        )
    return suffix
