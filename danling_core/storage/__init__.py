"""Bytes at a URL: a local path, `s3://`, `gs://`, `memory://`, or whatever fsspec knows."""

from __future__ import annotations

from danling_core.storage.backend import Entry
from danling_core.storage.documents import (
    DOCUMENT_BYTES,
    parse_json,
    parse_json_object,
    read_json,
    read_json_object,
    to_json,
    write_json,
)
from danling_core.storage.operations import (
    create_exclusive,
    delete,
    exists,
    get_file,
    list_names,
    list_tree,
    put_file,
    read_bytes,
    read_many,
    reconnect,
    size,
    write_bytes,
)
from danling_core.storage.retries import Retry
from danling_core.storage.settings import configure, prompt, using
from danling_core.storage.urls import base_name, is_local, join, local_path, parent, scheme

__all__ = [
    "DOCUMENT_BYTES",
    "Entry",
    "Retry",
    "base_name",
    "configure",
    "create_exclusive",
    "delete",
    "exists",
    "get_file",
    "is_local",
    "join",
    "list_names",
    "list_tree",
    "local_path",
    "parent",
    "prompt",
    "put_file",
    "read_bytes",
    "parse_json",
    "parse_json_object",
    "read_json",
    "read_json_object",
    "read_many",
    "reconnect",
    "scheme",
    "size",
    "to_json",
    "using",
    "write_bytes",
    "write_json",
]
