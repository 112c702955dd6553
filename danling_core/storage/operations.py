"""Reads, writes and lists bytes at URLs, with retries, and raising our own errors only."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ..errors import NotFound, StorageError
from . import failures
from .backend import TEMPORARY_MARK, Backend, Entry
from .local import LocalBackend
from .settings import Settings, current
from .urls import is_local, local_path

T = TypeVar("T")
Options = Mapping[str, Any]
_READS_AT_ONCE = 32


def read_bytes(url: str, storage_options: Options | None = None) -> bytes:
    """The whole object. Raises `NotFound` where there is none."""
    return _attempt("read", url, storage_options, lambda store, path: store.read(path))


def read_many(urls: Sequence[str], storage_options: Options | None = None) -> list[bytes | None]:
    """Many small objects, read in parallel, in the order of `urls`; None for those that are not there."""
    settings = _settings(storage_options)

    def read_one(url: str) -> bytes | None:
        try:
            return _attempt_with(settings, "read", url, lambda store, path: store.read(path))
        except NotFound:
            return None

    if len(urls) < 2 or all(is_local(url) for url in urls):
        return [read_one(url) for url in urls]
    with ThreadPoolExecutor(min(_READS_AT_ONCE, len(urls)), thread_name_prefix="danling-read") as pool:
        return list(pool.map(read_one, urls))


def write_bytes(
    url: str, data: bytes, storage_options: Options | None = None, *, is_durable: bool = True
) -> None:
    """Replaces the whole object at once: a reader sees the old bytes or the new ones, never a mixture.

    Args:
        url: where to; folders are made as needed, buckets are not.
        data: all of it.
        storage_options: instead of the configured ones.
        is_durable: on a local disk, wait until it would survive a power cut; stores always do.
    """
    _attempt("write", url, storage_options, lambda store, path: store.write(path, data, is_durable))


def create_exclusive(url: str, data: bytes, storage_options: Options | None = None) -> bool:
    """Creates the object if there is none, and says whether this call did.

    An answer lost on the way is resolved by reading back: `data` must hold something that no other
    writer would write (an attempt id), or two writers may both be told yes.
    """

    def create(store: Backend, path: str) -> bool:
        try:
            store.create(path, data)
            return True
        except Exception as error:
            if not failures.already_exists(error):
                raise
        try:
            return store.read(path) == data
        except FileNotFoundError as error:
            raise failures.Passing(f"{path} existed and was gone a moment later") from error

    return _attempt("create", url, storage_options, create)


def put_file(local: str, url: str, storage_options: Options | None = None) -> None:
    """Streams a local file to the URL, then asks the store afresh for the size.

    The file must not change meanwhile. Raises `NotFound` if it is not there.
    """
    if not os.path.isfile(local):
        raise NotFound(f"cannot put {local!r}: there is no such local file")

    def put(store: Backend, path: str) -> None:
        store.put(local, path)
        wanted, found = os.stat(local).st_size, store.size(path)
        if wanted != found:
            raise failures.Passing(f"{wanted} bytes were sent and the store has {found}")

    _attempt("put", url, storage_options, put)


def get_file(url: str, local: str, storage_options: Options | None = None) -> None:
    """Streams the object into a local file, which appears whole or not at all."""
    folder = os.path.dirname(os.path.abspath(local))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(
        folder, f".{os.path.basename(local)}{TEMPORARY_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    )

    def get(store: Backend, path: str) -> None:
        store.get(path, temporary)
        wanted, found = store.size(path), os.stat(temporary).st_size
        if wanted != found:
            raise failures.Passing(f"the store has {wanted} bytes and {found} arrived")

    try:
        _attempt("get", url, storage_options, get)
        os.replace(temporary, local)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def size(url: str, storage_options: Options | None = None) -> int:
    """Bytes of the object, asked afresh. Raises `NotFound`."""
    return _attempt("ask the size of", url, storage_options, lambda store, path: store.size(path))


def exists(url: str, storage_options: Options | None = None) -> bool:
    """Whether there is an object or a folder with something in it."""
    return _attempt("look for", url, storage_options, lambda store, path: store.exists(path))


def delete(url: str, recursive: bool = False, storage_options: Options | None = None) -> None:
    """Deletes the object, or with `recursive` everything below. What is not there already is no error."""

    def remove(store: Backend, path: str) -> None:
        try:
            (store.delete_tree if recursive else store.delete)(path)
        except FileNotFoundError as error:
            if failures.error_code(error) == "NoSuchBucket":
                raise

    _attempt("delete", url, storage_options, remove)


def list_names(url: str, storage_options: Options | None = None) -> list[str]:
    """Sorted names directly below a folder, folders included; `[]` where there is nothing."""
    return _attempt("list", url, storage_options, lambda store, path: _unless_missing(store.names, path))


def list_tree(url: str, storage_options: Options | None = None) -> list[Entry]:
    """Every file below a folder, by one flat listing, sorted by path; `[]` where there is nothing."""
    return _attempt("list", url, storage_options, lambda store, path: _unless_missing(store.tree, path))


def reconnect() -> None:
    """Drops this process's connections: the next operation reads the credentials afresh. After a failure."""
    if (remote := sys.modules.get(f"{__package__}.remote")) is not None:
        remote.forget_file_systems()


def _unless_missing(listing: Callable[[str], list[T]], path: str) -> list[T]:
    try:
        return listing(path)
    except FileNotFoundError as error:
        if failures.error_code(error) == "NoSuchBucket":
            raise
        return []
    except NotADirectoryError:
        return []


def _attempt(operation: str, url: str, options: Options | None, call: Callable[[Backend, str], T]) -> T:
    return _attempt_with(_settings(options), operation, url, call)


def _attempt_with(settings: Settings, operation: str, url: str, call: Callable[[Backend, str], T]) -> T:
    if not url:
        raise StorageError(f"cannot {operation} an empty URL")
    store, path, identity = _backend(url, settings.options)
    return settings.retry.call(operation, url, lambda: call(store, path), identity)


def _settings(options: Options | None) -> Settings:
    settings = current()
    return settings if options is None else Settings(dict(options), settings.retry)


def _backend(url: str, options: Options) -> tuple[Backend, str, str]:
    if is_local(url):
        return LocalBackend(), local_path(url), ""
    from .remote import RemoteBackend, describe_identity

    return RemoteBackend(url, options), url, describe_identity(url, options)
