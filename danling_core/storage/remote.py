"""Object stores through fsspec: the only module that imports it."""

from __future__ import annotations

import functools
import importlib
import json
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

from danling_core.errors import StorageError
from danling_core.storage.backend import Entry, Unreadable
from danling_core.storage.settings import Settings
from danling_core.storage.urls import scheme

PART_BYTES = 8 * 2**20
PARTS_AT_ONCE = 4
_EXTRAS = {"s3": ("s3", "s3fs"), "s3a": ("s3", "s3fs"), "gs": ("gcs", "gcsfs"), "gcs": ("gcs", "gcsfs")}
_S3_WAITS = ("connect_timeout", "read_timeout")
_file_systems: dict[tuple[int, str, str, bool, float | None], Any] = {}
_lock = threading.Lock()


class RemoteBackend:
    """Implements `Backend` over one fsspec file system; paths are URLs. Never shared with a forked child."""

    def __init__(self, url: str, settings: Settings) -> None:
        self.scheme = scheme(url)
        self.fs = _file_system(self.scheme, settings)

    def read(self, path: str) -> bytes:
        once = {"max_concurrency": 1} if self._is_s3 else {}  # without it s3fs asks for the size first
        return bytes(self.fs.cat_file(path, **once))

    def write(self, path: str, data: bytes, is_durable: bool) -> None:
        self.fs.pipe_file(path, data)

    def create(self, path: str, data: bytes) -> None:
        self.fs.pipe_file(path, data, mode="create")

    def put(self, local: str, path: str) -> None:
        self.fs.put_file(local, path, **self._part_options(16 * 2**20))

    def get(self, path: str, local: str) -> None:
        self.fs.get_file(path, local, **(self._part_options() if self._is_s3 else {}))

    def size(self, path: str) -> int:
        info = self.fs.info(path)
        if info["type"] != "file":
            raise FileNotFoundError(path)
        return int(info["size"])

    def exists(self, path: str) -> bool:
        try:
            self.fs.info(path)
        except FileNotFoundError:
            return False
        return True

    def delete(self, path: str) -> None:
        self.fs.rm_file(path)

    def delete_tree(self, path: str) -> None:
        paths = [entry["name"] for entry in self._find(path)]
        with ThreadPoolExecutor(min(16, len(paths) or 1)) as pool:
            list(pool.map(self._delete_if_there, paths))
        if self.scheme == "memory" and self.fs.isdir(path):
            self.fs.rm(path, recursive=True)

    def names(self, path: str) -> list[str]:
        own = self._stripped(path)
        found = {entry["name"].rstrip("/") for entry in self.fs.ls(path, detail=True)}
        return sorted(name.rpartition("/")[2] for name in found if name.strip("/") != own)

    def tree(self, path: str, unreadable: Unreadable | None = None) -> list[Entry]:
        prefix = self._stripped(path) + "/"
        entries = []
        for info in self._find(path):
            name = info["name"].lstrip("/")
            if name.startswith(prefix) and not name.endswith("/"):
                entries.append(Entry(name[len(prefix) :], int(info["size"]), _mtime(info)))
        return sorted(entries)

    @property
    def _is_s3(self) -> bool:
        return _EXTRAS.get(self.scheme, ("",))[0] == "s3"

    def _part_options(self, gcs_part_bytes: int = 0) -> dict[str, int]:
        if self._is_s3:
            return {"chunksize": PART_BYTES, "max_concurrency": PARTS_AT_ONCE}
        return {"chunksize": gcs_part_bytes} if self.scheme in ("gs", "gcs") else {}

    def _find(self, path: str) -> list[dict[str, Any]]:
        return list(self.fs.find(path, detail=True).values())

    def _stripped(self, path: str) -> str:
        return str(self.fs._strip_protocol(path)).strip("/")

    def _delete_if_there(self, path: str) -> None:
        try:
            self.fs.rm_file(path)
        except FileNotFoundError:
            return


def forget_file_systems() -> None:
    """Drop the open connections of this process: the next operation reads the credentials again."""
    with _lock:
        _file_systems.clear()


def describe_identity(url: str, options: Mapping[str, Any]) -> str:
    """Describe the client's identity and endpoint for messages: of an access key only the last four characters."""
    endpoint = options.get("endpoint_url")
    if _EXTRAS.get(scheme(url), ("",))[0] == "s3":
        endpoint = (
            endpoint
            or os.environ.get("AWS_ENDPOINT_URL_S3")
            or os.environ.get("AWS_ENDPOINT_URL")
            or "AWS (no AWS_ENDPOINT_URL is set)"
        )
        key = os.environ.get("AWS_ACCESS_KEY_ID", "")
        profile = options.get("profile") or os.environ.get("AWS_PROFILE")
        who = (
            f"access key ending in {key[-4:]!r}"
            if key
            else f"profile {profile!r}"
            if profile
            else "the AWS chain"
        )
    elif scheme(url) in ("gs", "gcs"):
        endpoint = endpoint or os.environ.get("STORAGE_EMULATOR_HOST") or "Google Cloud Storage"
        file = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
        who = f"the credentials in {file}" if file else "Google's default credentials"
    else:
        return ""
    return f"asked {endpoint} as {who}"


def _file_system(protocol: str, settings: Settings) -> Any:
    options = json.dumps(dict(settings.options), sort_keys=True, default=str)
    key = (os.getpid(), protocol, options, settings.is_single, settings.answer_seconds)
    with _lock:
        if key not in _file_systems:
            _file_systems[key] = _open_file_system(protocol, settings)
        return _file_systems[key]


def _open_file_system(protocol: str, settings: Settings) -> Any:
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = (
        "false"  # unset, it costs 60 s per bucket on an emulator
    )
    extra, module = _EXTRAS.get(protocol, ("", ""))
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise StorageError(
                f"'{protocol}://' URLs need {module}, which cannot be imported here ({error}): "
                f"pip install 'danling-flows[{extra}]'"
            ) from error
    fsspec = importlib.import_module("fsspec")
    try:
        fs = fsspec.filesystem(protocol, **_fsspec_options(extra, settings))
    except (ImportError, ValueError, TypeError) as error:
        raise StorageError(f"cannot open the store of {protocol!r} URLs: {error}") from error
    if settings.is_single:
        _repeat_nothing(extra, fs)
    return fs


def _repeat_nothing(extra: str, fs: Any) -> None:
    """Turn off what the fsspec adapter repeats by itself; `_fsspec_options` does so for its client."""
    if extra == "s3":
        fs.retries = 1
    elif extra == "gcs":  # no option says so: the request without the decorator that repeats it
        fs._request = functools.partial(type(fs)._request.__wrapped__, fs)


def _fsspec_options(extra: str, settings: Settings) -> dict[str, Any]:
    chosen: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    options = dict(settings.options)
    if extra == "s3":
        return chosen | _s3_options(options, settings)
    if extra == "gcs":
        return chosen | _gcs_options(options, settings)
    return {**chosen, **options}


def _s3_options(options: dict[str, Any], settings: Settings) -> dict[str, Any]:
    region = options.pop("region", None) or options.pop("region_name", None)
    options.pop("project", None)
    if region:
        options["client_kwargs"] = {**options.get("client_kwargs", {}), "region_name": region}
    options["config_kwargs"] = {
        "connect_timeout": 10,
        "read_timeout": 60,
        "max_pool_connections": 64,
        "retries": {"mode": "standard", "max_attempts": 4},
        **options.get("config_kwargs", {}),
    }
    if settings.is_single:
        options["config_kwargs"]["retries"] = {"mode": "standard", "total_max_attempts": 1}
    if (seconds := settings.answer_seconds) is not None:
        waits = {name: min(seconds, options["config_kwargs"][name]) for name in _S3_WAITS}
        options["config_kwargs"].update(waits)
    return options


def _gcs_options(options: dict[str, Any], settings: Settings) -> dict[str, Any]:
    for name in ("region", "region_name"):
        options.pop(name, None)
    if settings.answer_seconds is not None:
        options["requests_timeout"] = settings.answer_seconds
    options.setdefault("project", os.environ.get("GOOGLE_CLOUD_PROJECT") or "danling")
    address = options.get("endpoint_url") or os.environ.get("STORAGE_EMULATOR_HOST", "")
    has_credentials = bool(os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"))
    if address and not address.startswith("https://") and not has_credentials:
        options.setdefault("token", "anon")  # an emulator; asking the metadata server would take seconds
    return options


def _mtime(info: Mapping[str, Any]) -> float:
    for name in ("LastModified", "updated", "mtime", "created"):
        value = info.get(name)
        if isinstance(value, str) and value:
            value = datetime.fromisoformat(value.replace("Z", "+00:00"))
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0
