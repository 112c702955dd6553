"""A small Google Cloud Storage: its JSON API in memory, with preconditions, resumable uploads and faults."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Fault = Callable[[str, str], "str | int | None"]
"""Given method and path: None, a status to answer with, "reset", or "lost" (done, but not answered)."""


@dataclass
class Blob:
    data: bytes
    generation: int
    content_type: str
    updated: str = field(default_factory=lambda: datetime.now(UTC).isoformat().replace("+00:00", "Z"))


class GCSServer:
    """Serves on loopback. `fault` is asked at every request and may be replaced at any time."""

    def __init__(self, *buckets: str) -> None:
        self.buckets: dict[str, dict[str, Blob]] = {name: {} for name in buckets}
        self.uploads: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str]] = []
        self.fault: Fault = lambda method, path: None
        self.lock = threading.RLock()
        self.counter = itertools.count(1)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": self}))
        self._server.daemon_threads = True
        # clients that hang up are part of the tests
        self._server.handle_error = lambda request, address: None
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> GCSServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def describe(self, bucket: str, name: str) -> dict[str, Any]:
        blob = self.buckets[bucket][name]
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(blob.data)),
            "generation": str(blob.generation),
            "contentType": blob.content_type,
            "updated": blob.updated,
            "timeCreated": blob.updated,
            "md5Hash": base64.b64encode(hashlib.md5(blob.data).digest()).decode(),
            "storageClass": "STANDARD",
        }

    def store_blob(self, bucket: str, name: str, data: bytes, content_type: str) -> dict[str, Any]:
        self.buckets[bucket][name] = Blob(data, next(self.counter), content_type)
        return self.describe(bucket, name)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: GCSServer

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the test output quiet."""

    def handle_any(self) -> None:
        parts = urlsplit(self.path)
        path = parts.path
        self.query = {key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.store.requests.append((self.command, self.path))
        fault = self.store.fault(self.command, self.path)
        self.is_lost = fault == "lost"
        if fault == "reset":
            self.close_connection = True
            return
        if isinstance(fault, int):
            self.answer(fault, {"error": {"code": fault, "message": f"injected {fault}"}})
            return
        with self.store.lock:
            self.route(path)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any

    def route(self, path: str) -> None:
        if match := re.fullmatch(r"/upload/session/(\w+)", path):
            return self.continue_upload(match[1])
        if path == "/token":  # where a service account's key says that tokens are given
            return self.answer(200, {"access_token": "token", "expires_in": 3600, "token_type": "Bearer"})
        match = re.fullmatch(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", path)
        if match is None:
            return self.fail(404)
        bucket, name = unquote(match[1]), unquote(match[2]) if match[2] else None
        if bucket not in self.store.buckets:
            return self.fail(404, f"The specified bucket does not exist: {bucket}")
        if path.startswith("/upload"):
            return self.begin_upload(bucket)
        if name is not None:
            return self.one_object(bucket, name, path)
        if path.endswith("/o"):
            return self.list_objects(bucket)
        self.answer(200, {"kind": "storage#bucket", "name": bucket})

    def one_object(self, bucket: str, name: str, path: str) -> None:
        blobs = self.store.buckets[bucket]
        if name not in blobs:
            return self.fail(404)
        if self.command == "DELETE":
            del blobs[name]
            return self.answer(204, None)
        if self.query.get("alt") != "media" and not path.startswith("/download"):
            return self.answer(200, self.store.describe(bucket, name))
        data, span = blobs[name].data, self.headers.get("Range")
        headers = {"X-Goog-Hash": "md5=" + self.store.describe(bucket, name)["md5Hash"]}
        if span is None:
            return self.answer(200, data, headers)
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", span).groups()
        end = min(int(last), len(data) - 1) if last else len(data) - 1
        if int(first) >= len(data):
            return self.fail(416)
        headers = {"Content-Range": f"bytes {first}-{end}/{len(data)}"}
        self.answer(206, data[int(first) : end + 1], headers)

    def list_objects(self, bucket: str) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        limit, after = int(self.query.get("maxResults") or 1000), self.query.get("pageToken", "")
        items: list[dict[str, Any]] = []
        prefixes: set[str] = set()
        token = None
        for name in sorted(self.store.buckets[bucket]):
            if not name.startswith(prefix) or name <= after:
                continue
            if len(items) >= limit:
                token = items[-1]["name"]
                break
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(self.store.describe(bucket, name))
        page = {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}
        self.answer(200, page | ({"nextPageToken": token} if token else {}))

    def begin_upload(self, bucket: str) -> None:
        if self.query.get("uploadType") == "resumable":
            session = f"s{next(self.store.counter)}"
            self.store.uploads[session] = {
                "bucket": bucket,
                "name": self.query.get("name") or json.loads(self.body)["name"],
                "is_exclusive": self.query.get("ifGenerationMatch") == "0",
                "data": b"",
                "content_type": self.headers.get("X-Upload-Content-Type", ""),
            }
            return self.answer(200, {}, {"Location": f"{self.store.url}/upload/session/{session}"})
        boundary = re.search(r'boundary="?([^";]+)"?', self.headers["Content-Type"])[1].encode()
        _, metadata, content, _ = self.body.split(b"--" + boundary, 3)
        name = json.loads(metadata.partition(b"\n\n")[2])["name"]
        head, _, data = content.partition(b"\n\n")
        if self.query.get("ifGenerationMatch") == "0" and name in self.store.buckets[bucket]:
            return self.fail(412)
        content_type = head.decode().partition("Content-Type: ")[2].strip()
        self.answer(200, self.store.store_blob(bucket, name, data[: -len(b"\n")], content_type))

    def continue_upload(self, session: str) -> None:
        upload = self.store.uploads.get(session)
        if upload is None:
            return self.fail(404)
        if self.command == "DELETE":
            del self.store.uploads[session]
            return self.answer(499, {})
        bucket, name = upload["bucket"], upload["name"]
        if "done" in upload:  # the answer was lost, and the client asks again
            return self.answer(200, upload["done"])
        first, last, total = map(
            int, re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", self.headers["Content-Range"]).groups()
        )
        upload["data"] = upload["data"][:first] + self.body
        if last + 1 < total:
            return self.answer(308, None, {"Range": f"bytes=0-{last}"})
        if upload["is_exclusive"] and name in self.store.buckets[bucket]:
            return self.fail(412)
        upload["done"] = self.store.store_blob(bucket, name, upload["data"], upload["content_type"])
        self.answer(200, upload["done"])

    def fail(self, status: int, message: str = "") -> None:
        self.answer(status, {"error": {"code": status, "message": message or f"status {status}"}})

    def answer(
        self, status: int, content: bytes | dict[str, Any] | None, headers: dict[str, str] | None = None
    ) -> None:
        if self.is_lost:
            self.close_connection = True
            return
        body = (
            content
            if isinstance(content, bytes)
            else b""
            if content is None
            else json.dumps(content).encode()
        )
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header(
            "Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json"
        )
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
