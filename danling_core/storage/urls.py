"""Parts of a URL: its scheme, its local path, its parent, its names."""

from __future__ import annotations

import os
import re

from danling_core.errors import StorageError
from danling_core.secrets import redact

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL_SCHEMES = ("file", "local")


def scheme(url: str) -> str:
    """Return `"s3"`, `"gs"`, ...; a plain path has the scheme `"file"`. A chained URL (`a::b://`) is refused."""
    if "::" in url.partition("://")[0]:
        raise StorageError(
            f"{redact(url)!r} is a chained URL; state the store itself, as in 's3://bucket/folder'"
        )
    match = _SCHEME.match(url)
    return match.group(1).lower() if match else "file"


def is_local(url: str) -> bool:
    """Return whether the URL is a path of this machine (`file://` or no scheme)."""
    return scheme(url) in _LOCAL_SCHEMES


def local_path(url: str) -> str:
    """Return the absolute path that a local URL names; `~` is expanded.

    Raises:
        StorageError: the URL is not local.
    """
    if not is_local(url):
        raise StorageError(f"a local path is needed here, and {redact(url)!r} is not one")
    path = _SCHEME.sub("", url, count=1)
    return os.path.abspath(os.path.expanduser(path))


def join(url: str, *parts: str) -> str:
    """Return `url` with `parts` appended by `/`; empty parts are skipped, `..` and absolute parts are refused."""
    joined = url if url.endswith("://") else url.rstrip("/")
    for part in parts:
        if part.startswith("/") or ".." in part.split("/") or _SCHEME.match(part):
            raise StorageError(f"{part!r} leaves the folder {redact(url)!r}")
        if name := part.strip("/"):
            joined += name if joined.endswith("://") else f"/{name}"
    return joined or "/"


def parent(url: str) -> str:
    """Return the folder above; a bucket is its own parent."""
    start = match.end() if (match := _SCHEME.match(url)) else 0
    head, separator, _ = url[start:].rstrip("/").rpartition("/")
    if not separator:
        return url.rstrip("/") if start else "."
    return url[:start] + (head or "/")


def base_name(url: str) -> str:
    """Return the last part of the URL."""
    return url.rstrip("/").rpartition("/")[2]
