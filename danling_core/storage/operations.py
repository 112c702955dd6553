"""Reads, writes and lists bytes at URLs, with retries, and raising our own errors only."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from danling_core.errors import NotFound, StorageError
from danling_core.secrets import redact
from danling_core.storage import failures
from danling_core.storage.backend import TEMPORARY_MARK, Backend, Entry, Unreadable, mounted
from danling_core.storage.local import LocalBackend
from danling_core.storage.settings import Settings, current
from danling_core.storage.urls import is_local, local_path, scheme

T = TypeVar("T")
Guard = Callable[[], None]
_READS_AT_ONCE = 32
_WHOLE_BYTES = 4 << 20  # so much goes up in one request, to every store


def read_bytes(url: str, limit: int | None = None) -> bytes:
    """Return the whole object.

    Args:
        url: where it is.
        limit: bytes that it may have; a larger one of the local disk is not even read.

    Raises:
        NotFound: there is none.
        StorageError: it is larger, or no file but a pipe or a device.
    """
    if limit is not None and is_local(url):
        _check_size(url, size(url), limit)
    data = _attempt("read", url, lambda store, path: store.read(path))
    if limit is not None:
        _check_size(url, len(data), limit)
    return data


def _check_size(url: str, found: int, limit: int) -> None:
    if found > limit:
        raise StorageError(f"{redact(url)!r} has {found} bytes, and at most {limit} are wanted there")


def read_many(urls: Sequence[str]) -> list[bytes | None]:
    """Many small objects, read in parallel, in the order of `urls`; None for those that are not there."""
    settings = current()

    def read_one(url: str) -> bytes | None:
        try:
            return _attempt_with(settings, "read", url, lambda store, path: store.read(path))
        except NotFound:
            return None

    if len(urls) < 2 or all(is_local(url) for url in urls):
        return [read_one(url) for url in urls]
    with ThreadPoolExecutor(min(_READS_AT_ONCE, len(urls)), thread_name_prefix="danling-read") as pool:
        return list(pool.map(read_one, urls))


def write_bytes(url: str, data: bytes, *, is_durable: bool = True, guard: Guard | None = None) -> None:
    """Replace the whole object at once: a reader sees the old bytes or the new ones, never a mixture.

    Args:
        url: where to; folders are made as needed, buckets are not.
        data: all of it.
        is_durable: on a local disk, wait until it would survive a power cut; stores always do.
        guard: called before every request to the store; raises if this process may not write any more.
    """
    _attempt("write", url, lambda store, path: store.write(path, data, is_durable), guard)


def create_exclusive(url: str, data: bytes) -> bool:
    """Create the object if there is none, and say whether this call did.

    An answer lost on the way is resolved by reading back: `data` must hold something that no other
    writer would write (an attempt id), or two writers may both get True.
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

    return _attempt("create", url, create)


def put_file(local: str, url: str, *, guard: Guard | None = None) -> None:
    """Stream a local file to the URL, then ask the store afresh for the size.

    The file must not change meanwhile. Raises `NotFound` if it is not there. `guard` as in `write_bytes`, but
    a file of more than 4 MiB is one attempt of many requests, which the client repeats by itself.
    """
    if not os.path.isfile(local):
        raise NotFound(f"cannot put {local!r}: there is no such local file")

    def put(store: Backend, path: str) -> None:
        store.put(local, path)
        wanted, found = os.stat(local).st_size, store.size(path)
        if wanted != found:
            raise failures.Passing(f"{wanted} bytes were sent and the store has {found}")

    _attempt("put", url, put, guard, is_single=os.stat(local).st_size <= _WHOLE_BYTES)


def get_file(url: str, local: str) -> None:
    """Stream the object into a local file, which appears whole or not at all."""
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
        _attempt("get", url, get)
        os.replace(temporary, local)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def size(url: str) -> int:
    """Return bytes of the object, asked afresh. Raises `NotFound`."""
    return _attempt("ask the size of", url, lambda store, path: store.size(path))


def exists(url: str) -> bool:
    """Return whether there is an object or a folder with something in it."""
    return _attempt("look for", url, lambda store, path: store.exists(path))


def delete(url: str, recursive: bool = False, *, guard: Guard | None = None) -> None:
    """Delete the object, or with `recursive` everything below. What is not there already is no error.

    `guard` as in `write_bytes`.
    """

    def remove(store: Backend, path: str) -> None:
        try:
            (store.delete_tree if recursive else store.delete)(path)
        except FileNotFoundError as error:
            if failures.error_code(error) == "NoSuchBucket":
                raise

    _attempt("delete", url, remove, guard)


def list_names(url: str) -> list[str]:
    """Return sorted names directly below a folder, folders included; `[]` where there is nothing."""
    return _attempt("list", url, lambda store, path: _unless_missing(store.names, path))


def list_tree(url: str, *, unreadable: Unreadable | None = None) -> list[Entry]:
    """Every file below a folder, by one flat listing, sorted by path; `[]` where there is nothing.

    Args:
        url: the folder.
        unreadable: called for each unreadable local folder below, which is then passed over.
    """
    return _attempt(
        "list", url, lambda store, path: _unless_missing(lambda top: store.tree(top, unreadable), path)
    )


def reconnect() -> None:
    """Drop this process's connections: the next operation reads the credentials afresh. After a failure."""
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


def _attempt(
    operation: str,
    url: str,
    call: Callable[[Backend, str], T],
    guard: Guard | None = None,
    is_single: bool = True,
) -> T:
    settings = current()
    if guard is not None and is_single:
        settings = replace(settings, is_single=True)  # so that the client repeats nothing without the guard
    return _attempt_with(settings, operation, url, call, guard)


def _attempt_with(
    settings: Settings,
    operation: str,
    url: str,
    call: Callable[[Backend, str], T],
    guard: Guard | None = None,
) -> T:
    if not url:
        raise StorageError(f"cannot {operation} an empty URL")
    store, path, identity = _backend(url, settings)

    def once() -> T:
        if guard is not None:
            guard()
        return call(store, path)

    return settings.retry.call(operation, url, once, identity)


def _backend(url: str, settings: Settings) -> tuple[Backend, str, str]:
    if is_local(url):
        return LocalBackend(), local_path(url), ""
    if (store := mounted.get(scheme(url))) is not None:
        return store, url, ""
    from danling_core.storage.remote import RemoteBackend, describe_identity

    return RemoteBackend(url, settings), url, describe_identity(url, settings.options)
